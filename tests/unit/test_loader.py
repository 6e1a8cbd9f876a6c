import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from ray_stateful.errors import ResizeRefused
from ray_stateful.format.values import decode, encode
from ray_stateful.states.loader import LoaderState, Merge, Refuse, Restart
from ray_stateful.states.part import World
from ray_stateful.states.random import RandomState
from ray_stateful.testing import assert_resumes

# torchdata 0.11 calls a function that torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")

SHRINK = World(saved_world_size=3, world_size=2, rank=1, step=10)


def loader(num_workers=0):
    return StatefulDataLoader(list(range(100)), batch_size=4, num_workers=num_workers)


def after(num_batches, num_workers=0):
    ours = loader(num_workers)
    batches = iter(ours)
    for _ in range(num_batches):
        next(batches)
    return ours, batches


def through_storage(state):
    return decode(encode(state, "loader"), "loader")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_data_loader_goes_on_after_the_batches_it_gave_out_not_those_it_prefetched(num_workers):
    ours, batches = after(7, num_workers)
    saved = through_storage(LoaderState(ours).state_dict())
    rest = [batch.tolist() for batch in batches]
    fresh = loader(num_workers)
    LoaderState(fresh).load_state_dict(saved)

    assert [batch.tolist() for batch in fresh] == rest
    assert len(rest) == 18


def test_another_number_of_workers_is_refused_by_name_unless_there_is_a_rule():
    for part in (LoaderState(loader()), LoaderState(loader(), on_resize=Refuse())):
        with pytest.raises(ResizeRefused, match=r"part 'train'.*3 workers.*Merge\(function\).*Restart\(\)"):
            part.check_resize("train", SHRINK)


def test_a_restarted_loader_begins_again_and_says_so():
    fresh = loader()
    part = LoaderState(fresh, on_resize=Restart())
    part.check_resize("train", SHRINK)
    said = part.resize({rank: through_storage(LoaderState(after(rank)[0]).state_dict()) for rank in range(3)}, SHRINK)

    assert said == "restarted: 3 positions saved, 2 workers; samples of this epoch are seen again"
    assert next(iter(fresh)).tolist() == [0, 1, 2, 3]


def furthest(saved, world):
    assert world is SHRINK
    return max(saved.values(), key=lambda state: state["_num_yielded"])


def test_a_merge_function_gets_all_saved_positions_and_its_answer_is_loaded():
    saved = {rank: through_storage(LoaderState(after(num)[0]).state_dict()) for rank, num in enumerate([2, 9, 5])}
    fresh = loader()
    said = LoaderState(fresh, on_resize=Merge(furthest)).resize(saved, SHRINK)

    assert said == "3 positions saved, 2 workers: merged by furthest"
    assert next(iter(fresh)).tolist() == [36, 37, 38, 39]


@pytest.mark.parametrize("rule", [Merge(lambda saved, world: saved[world.rank]), Restart()], ids=["merge", "restart"])
def test_after_a_resize_the_next_batch_draws_nothing_from_the_runs_random_stream(rule):
    fresh = loader()
    part = LoaderState(fresh, on_resize=rule)
    part.resize({rank: through_storage(LoaderState(after(rank)[0]).state_dict()) for rank in range(3)}, SHRINK)
    stream = torch.get_rng_state()

    next(iter(fresh))
    assert torch.equal(torch.get_rng_state(), stream)


def test_neither_a_save_before_the_first_batch_nor_the_first_one_after_a_restore_draws_from_the_runs_random_stream():
    saved, fresh = through_storage(LoaderState(after(2)[0]).state_dict()), loader()
    stream = torch.get_rng_state()
    LoaderState(loader()).state_dict()
    assert torch.equal(torch.get_rng_state(), stream)

    LoaderState(fresh).load_state_dict(saved)
    stream = torch.get_rng_state()
    next(iter(fresh))
    assert torch.equal(torch.get_rng_state(), stream)


def test_a_loader_without_a_position_is_refused_when_it_is_wrapped():
    with pytest.raises(ValueError, match="a list has no state_dict"):
        LoaderState([1, 2, 3])


@pytest.mark.parametrize("num_steps", [0, 2, 5, 6])
def test_a_loader_that_is_started_once_more_does_not_shift_the_runs_random_stream(num_steps):
    """Resumed before its first batch, within an epoch, after its last batch, and within the next."""

    def build():
        ours, batches = StatefulDataLoader(list(range(20)), batch_size=4, shuffle=True), None

        def step():
            nonlocal batches
            batches = iter(ours) if batches is None else batches
            batch = next(batches, None)
            if batch is None:
                batches = iter(ours)
                batch = next(batches)
            return batch, torch.rand(1)

        return {"loader": LoaderState(ours), "random": RandomState()}, step

    assert_resumes(build, num_steps=num_steps, num_more=7)
