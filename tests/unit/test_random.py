import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from ray_stateful import checkpoint
from ray_stateful.errors import StateMismatch
from ray_stateful.format.values import decode, encode
from ray_stateful.states.part import World
from ray_stateful.states.random import RandomState
from tests.part import Part

BIT_GENERATORS = [np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64]


def named():
    return {
        "torch": torch.Generator(),
        "python": random.Random(),
        **{bits.__name__: np.random.Generator(bits()) for bits in BIT_GENERATORS},
    }


def draw(generators):
    """A few values of every stream, so that a stream that was restored halfway (a cached gauss) shows."""
    drawn = [random.random(), random.gauss(0, 1), *np.random.standard_normal(3), *torch.randn(3).tolist()]
    for generator in generators.values():
        if isinstance(generator, torch.Generator):
            drawn += torch.randn(3, generator=generator).tolist()
        elif isinstance(generator, random.Random):
            drawn += [generator.gauss(0, 1), generator.random()]
        else:
            drawn += [*generator.standard_normal(3), int(generator.integers(2**31, dtype=np.int32))]
    return drawn


def through_storage(state):
    return decode(encode(state, "random"), "random")


@pytest.fixture(autouse=True)
def keep_the_streams_of_other_tests():
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(pytorch)


def test_every_stream_goes_on_exactly_where_it_was():
    ours = named()
    draw(ours)
    saved = through_storage(RandomState(ours).state_dict())
    expected = draw(ours)
    draw(ours)
    fresh = named()
    RandomState(fresh).load_state_dict(saved)

    assert draw(fresh) == expected


def test_streams_go_on_where_they_were_although_another_part_draws_while_it_is_loaded(tmp_path):
    class Drawing(Part):
        def load_state_dict(self, value):
            torch.rand(7)

    checkpoint.save({"random": RandomState(), "zeta": Drawing(1)}, step=1, run=str(tmp_path))
    expected = draw({})
    checkpoint.restore({"random": RandomState(), "zeta": Drawing(1)}, run=str(tmp_path))

    assert draw({}) == expected


def test_the_first_save_of_a_process_that_is_no_worker_of_ray_draws_from_no_stream(tmp_path):
    script = """if True:
        import random, sys
        import ray.train
        from ray_stateful import RandomState, save
        before = random.getstate()
        save({"random": RandomState(seed=0)}, step=1, run=sys.argv[1])
        assert random.getstate() == before
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path)], check=True, timeout=120)


@pytest.mark.parametrize("name", ["torch", "generator mine"])
def test_a_torch_stream_that_would_be_read_past_its_words_is_refused_and_no_other_is(name):
    part = RandomState({"mine": torch.Generator()})
    for _ in range(1300):
        torch.rand(1)
        part.load_state_dict(part.state_dict())
    saved = part.state_dict()
    for left, position, fine in [(1, 0, True), (625 - 7, 7, True), (624, 624, False), (600, 26, False)]:
        head = torch.tensor([left, 1, position, 0], dtype=torch.int32).view(torch.uint8)
        saved["streams"][name][8:24] = head
        if fine:
            part.load_state_dict(saved)
        else:
            before = part.state_dict()
            with pytest.raises(StateMismatch, match="more words left"):
                part.load_state_dict(saved)
            assert torch.equal(before["streams"][name], part.state_dict()["streams"][name])


def test_what_was_saved_does_not_change_with_later_draws():
    ours = named()
    state = RandomState(ours).state_dict()
    before = encode(state, "random")
    draw(ours)

    assert encode(state, "random") == before


def resized(rank, *, step=1200, world_size=3, seed=17, saved_seed=17, num_saved=4):
    saved = {r: through_storage(RandomState(named(), seed=saved_seed).state_dict()) for r in range(num_saved)}
    generators = named()
    state = RandomState(generators, seed=seed)
    world = World(saved_world_size=num_saved, world_size=world_size, rank=rank, step=step)
    state.check_resize("random", world)
    said = state.resize(saved, world)
    return draw(generators), said, state


def test_derived_streams_are_the_same_for_the_same_resume_whatever_was_drawn_before():
    first, said, _ = resized(1)
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)

    assert resized(1)[0] == first
    assert said == "4 streams saved, 3 workers: derived from (seed 17, step 1200, rank)"


def test_derived_streams_differ_by_rank_step_and_seed_and_from_each_other():
    worlds = [resized(0), resized(1), resized(2), resized(0, step=1201), resized(0, saved_seed=18)]
    values = [value for drawn, *_ in worlds for value in drawn]

    assert len(set(values)) == len(values)


def test_the_seed_of_derived_streams_is_the_checkpoints():
    drawn, said, state = resized(0, seed=5, saved_seed=17)

    assert "seed 17" in said
    assert drawn == resized(0, seed=17)[0]
    assert state.state_dict()["seed"] == 17

    # Also where nothing is derived now: the next resume may be on another number of workers.
    exact = RandomState(seed=5)
    exact.load_state_dict(RandomState(seed=17).state_dict())
    assert exact.state_dict()["seed"] == 17


def test_without_a_seed_streams_are_derived_from_what_rank_0_was_seeded_with():
    torch.manual_seed(31)
    drawn, said, _ = resized(0, seed=None, saved_seed=None)

    assert "seed 31" in said
    assert drawn == resized(0, saved_seed=31)[0]


def test_other_named_generators_than_were_saved_are_refused_before_any_stream_is_touched():
    saved = RandomState({"dropout": torch.Generator()}).state_dict()
    torch.manual_seed(5)
    before = torch.get_rng_state()

    with pytest.raises(StateMismatch, match="mixup is not in the checkpoint") as refused:
        RandomState({"mixup": random.Random()}).load_state_dict(saved)

    assert any("generator dropout is in the checkpoint" in problem for problem in refused.value.problems)
    assert RandomState({"mixup": random.Random()}).check_resized({0: saved, 1: saved}) == refused.value.problems
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("generator", [random.SystemRandom(), np.random.RandomState(0), 7])
def test_a_generator_without_a_state_of_a_known_kind_is_refused_by_name(generator):
    with pytest.raises(ValueError, match="generator 'noise' is a"):
        RandomState({"noise": generator})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_streams_go_on_exactly_and_are_derived_on_another_number_of_workers():
    torch.randn(3, device="cuda")
    saved = through_storage(RandomState().state_dict())
    expected = torch.randn(1000, device="cuda")
    RandomState().load_state_dict(saved)
    assert torch.equal(torch.randn(1000, device="cuda"), expected)

    def derived(rank):
        RandomState().resize({0: saved}, World(saved_world_size=1, world_size=2, rank=rank, step=3))
        return torch.randn(1000, device="cuda")

    assert torch.equal(derived(0), derived(0))
    assert not torch.equal(derived(0), derived(1))


def test_ranks_of_one_tensor_parallel_group_derive_the_same_streams():
    def drawn(rank, data_parallel_rank):
        state = RandomState(seed=17, data_parallel_rank=data_parallel_rank)
        saved = {n: RandomState(seed=17).state_dict() for n in range(2)}
        state.resize(saved, World(saved_world_size=2, world_size=4, rank=rank, step=3))
        return random.random(), torch.rand(3).tolist()

    assert drawn(0, 0) == drawn(1, 0)
    assert drawn(2, 1) == drawn(3, 1)
    assert drawn(1, 0) != drawn(2, 1)
    assert drawn(1, 1) == drawn(1, None)


def test_a_rank_of_another_data_parallel_rank_does_not_go_on_at_equal_size():
    saved = RandomState(data_parallel_rank=1).state_dict()

    with pytest.raises(StateMismatch, match=r"data_parallel_rank is another one .*the mesh that saved"):
        RandomState(data_parallel_rank=0).load_state_dict(saved)
    RandomState(data_parallel_rank=1).load_state_dict(saved)
    # As earlier versions saved it.
    del saved["data_parallel_rank"]
    RandomState(data_parallel_rank=0).load_state_dict(saved)


@pytest.fixture
def cuda(monkeypatch):
    """CUDA, played by as many generators of the host as are asked for."""

    def play(num_devices):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_devices > 0)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: num_devices > 0)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        generators = tuple(torch.Generator().manual_seed(n) for n in range(num_devices))
        monkeypatch.setattr(torch.cuda, "default_generators", generators)

    return play


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (1, 0, ["stream cuda 0 is left out: not drawn on here"]),
        (0, 1, ["stream cuda 0 is as it was seeded: not in the checkpoint"]),
        (2, 1, ["stream cuda 1 is left out: not drawn on here"]),
        (1, 1, []),
    ],
)
def test_the_report_calls_random_streams_exact_only_if_all_cuda_streams_go_on(tmp_path, cuda, before, after, said):
    cuda(before)
    checkpoint.save({"random": RandomState(devices=range(before))}, step=1, run=str(tmp_path))
    cuda(after)
    (part,) = checkpoint.restore({"random": RandomState()}, run=str(tmp_path)).parts

    assert (part.outcome, list(part.details)) == ("changed" if said else "exact", said)


def test_another_number_of_devices_that_were_named_is_refused(cuda):
    cuda(2)
    for before, after, where in [([0], [0, 1], "is not in"), ([0, 1], [1], "is in")]:
        saved = RandomState(devices=before).state_dict()
        with pytest.raises(StateMismatch, match=f"cuda 1 {where} the checkpoint: give as many devices="):
            RandomState(devices=after).load_state_dict(saved)
        RandomState(devices=[1, 0][: len(before)]).load_state_dict(saved)
