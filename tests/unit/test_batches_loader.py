import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ray_stateful.states.batches import GlobalBatchSampler
from ray_stateful.states.gradients import accumulate
from ray_stateful.states.progress import Progress

LENGTH = 103


class Squares(Dataset):
    def __getitem__(self, index):
        return index, index * index

    def __len__(self):
        return LENGTH


class Noise(Dataset):
    """A dataset that draws in the worker, as augmentation does."""

    def __getitem__(self, index):
        return torch.rand(())


class Moved(DataLoader):
    """As ray.train.torch.prepare_data_loader(..., add_dist_sampler=False): the same loader, its batches on a device."""

    def __init__(self, loader):
        self.__dict__ |= loader.__dict__ | {"loader": loader}

    def __iter__(self):
        return ([values.to("cpu") for values in batch] for batch in self.loader)


def sampler(rank=0, world_size=1, saved=None, **options):
    batches = GlobalBatchSampler(
        LENGTH, global_batch_size=16, micro_batch_size=3, seed=9, rank=rank, world_size=world_size, **options
    )
    if saved is not None:
        batches.load_state_dict(saved)
    return batches


def loader_of(batches, num_workers, dataset=None):
    return DataLoader(dataset or Squares(), batch_sampler=batches.micro_batches(), num_workers=num_workers)


def train(world_size, num_workers, num_steps, saved=None):
    """Every rank's DataLoader in turn: what was trained, and the state after the last step."""
    trained, states = [], []
    for rank in range(world_size):
        batches = sampler(rank, world_size, saved)
        for steps, batch in enumerate(batches.paired_with(loader_of(batches, num_workers)), start=1):
            for micro, (indices, squares) in batch:
                assert indices.tolist() == micro.indices
                assert torch.equal(squares, indices**2)
                trained += [] if micro.is_padding else micro.indices
            batches.on_step(step=steps)
            if steps == num_steps:
                break
        states.append(batches.state_dict())
    assert all(state == states[0] for state in states)
    return trained, states[0]


@pytest.mark.parametrize(("num_workers", "before", "after"), [(0, 3, 2), (2, 2, 3), (2, 1, 1)])
def test_a_data_loader_that_prefetches_neither_loses_nor_repeats_a_sample_over_a_restart(num_workers, before, after):
    first, saved = train(before, num_workers, num_steps=3)
    assert saved["position"] == 48  # not 103, where the loader's workers were already
    second, ended = train(after, num_workers, num_steps=None, saved=saved)

    assert sorted(first + second) == list(range(LENGTH))
    assert (ended["epoch"], ended["position"]) == (1, 0)


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_length_of_the_view_is_the_number_of_micro_batches_left(drop_last):
    for world_size in (1, 3, 20):
        batches = sampler(0, world_size, drop_last=drop_last)
        while batches.epoch == 0:
            view = batches.micro_batches()
            assert len(view) == sum(1 for _ in view) == len(loader_of(batches, 0))
            batches.on_step(step=1)


@pytest.mark.parametrize("num_passed_over", [0, 1])
def test_a_batch_or_a_rest_of_one_that_was_passed_over_is_not_given_to_the_next_one(num_passed_over):
    batches = sampler()
    for step, batch in enumerate(batches.paired_with(loader_of(batches, 0))):
        for micro, (indices, _) in batch if step >= num_passed_over else ():
            assert indices.tolist() == micro.indices
            break
        batches.on_step(step=step)

    assert batches.epoch == 1


def test_a_batch_is_gone_over_a_second_time_from_a_list_of_it_and_otherwise_not():
    batches = sampler()
    paired = batches.paired_with(loader_of(batches, 0))
    kept = list(next(paired))
    batches.on_step(step=1)
    batch = next(paired)
    for _ in accumulate(torch.nn.Linear(1, 1), batch):
        break

    assert [len(indices) for _ in range(2) for _, (indices, _) in kept] == [3, 3, 3, 3, 2, 2] * 2
    with pytest.raises(RuntimeError, match=r"the batch at sample 16 of epoch 0 .*list\(batch\)"):
        list(batch)


def test_a_batch_with_its_data_says_what_there_is_to_count():
    batches, progress = sampler(), Progress()
    for batch in batches.paired_with(loader_of(batches, 0)):
        progress.count(samples=batch.num_samples, epoch=batch.epoch)
        batches.on_step(step=1)

    assert (progress.samples, progress.epoch) == (LENGTH, 0)


def test_starting_a_loader_once_more_after_a_restart_does_not_shift_the_runs_random_stream():
    batches = sampler()
    before = torch.get_rng_state()
    next(batches.paired_with(loader_of(batches, 0)))

    assert torch.equal(torch.get_rng_state(), before)


def test_workers_draw_the_same_for_the_same_position_and_rank_and_otherwise_not():
    def drawn(rank, position, epoch=0):
        batches = sampler(rank, 2, sampler().state_dict() | {"position": position, "epoch": epoch})
        batch = next(batches.paired_with(loader_of(batches, 1, Noise())))
        return torch.cat([data for _, data in batch])

    first = drawn(0, 16)
    torch.rand(5)

    assert torch.equal(first, drawn(0, 16))
    assert not torch.equal(first, drawn(1, 16))
    assert not torch.equal(first, drawn(0, 32))
    assert not torch.equal(first, drawn(0, 16, epoch=1))


def test_a_loader_of_another_sampler_or_one_that_ends_early_is_an_error():
    batches = sampler()
    with pytest.raises(ValueError, match="a view of another sampler"):
        batches.paired_with(loader_of(sampler(), 0))

    (batch,) = [next(batches.paired_with([1, 2, 3]))]
    with pytest.raises(RuntimeError, match=r"the loader ended at the batch at sample 0 .*batch_sampler"):
        list(batch)


def test_a_loader_that_chooses_its_own_samples_or_their_order_is_refused_and_one_that_moves_ours_is_not():
    batches = sampler()
    ours = loader_of(batches, 0)
    # What ray.train.torch.prepare_data_loader makes of it, on more than one worker.
    prepared = DataLoader(ours.dataset, batch_size=ours.batch_size, sampler=DistributedSampler(Squares(), 2, 0))
    for loader in (prepared, DataLoader(Squares(), batch_size=3), DataLoader(Squares(), batch_size=None)):
        with pytest.raises(ValueError, match=r"Sampler, which chooses other .*add_dist_sampler=False"):
            batches.paired_with(loader)
    unordered = DataLoader(Squares(), batch_sampler=batches.micro_batches(), num_workers=2, in_order=False)
    with pytest.raises(ValueError, match="in_order=False"):
        batches.paired_with(unordered)

    moved = Moved(ours)
    whole = DataLoader(torch.arange(LENGTH), batch_size=None, sampler=batches.micro_batches())
    for loader, indices_of in [(moved, lambda data: data[0]), (whole, lambda data: data)]:
        for micro, data in next(batches.paired_with(loader)):
            assert indices_of(data).tolist() == micro.indices
