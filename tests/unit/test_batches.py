from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_stateful import checkpoint
from ray_stateful.checkpointer import Checkpointer
from ray_stateful.errors import StateMismatch
from ray_stateful.format.values import decode, encode
from ray_stateful.states.batches import GlobalBatchSampler
from ray_stateful.states.permutation import Permutation
from ray_stateful.states.shares import share_of, split_evenly


def world_of(world_size, length=103, *, saved=None, global_batch_size=16, micro_batch_size=3, **given):
    """One sampler per rank, all of them where `saved` was saved."""
    samplers = [
        GlobalBatchSampler(
            length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
            **given,
        )
        for rank in range(world_size)
    ]
    for sampler in samplers if saved else []:
        sampler.load_state_dict(decode(encode(saved, "batches"), "batches"))
    return samplers


def trained_by(batches):
    """The samples of one global batch, from every rank's share of it, without padding."""
    return [index for batch in batches for micro in batch if not micro.is_padding for index in micro.indices]


def run_steps(samplers, num_steps):
    """Train `num_steps` global batches, over ends of epochs; (epoch, samples) of each."""
    iterators = [iter(sampler) for sampler in samplers]
    trained = []
    while len(trained) < num_steps:
        batches = [next(iterator, None) for iterator in iterators]
        if batches[0] is None:
            assert batches == [None] * len(samplers)
            iterators = [iter(sampler) for sampler in samplers]
            continue
        trained.append((batches[0].epoch, trained_by(batches)))
        for sampler in samplers:
            sampler.on_step(step=len(trained))
    return trained


@settings(max_examples=200, deadline=None)
@given(
    num=st.integers(1, 70), start=st.integers(0, 9), world_size=st.integers(1, 20), micro_batch_size=st.integers(1, 9)
)
def test_shares_cover_the_batch_once_in_as_many_micro_batches_on_every_rank(num, start, world_size, micro_batch_size):
    positions = range(start, start + num)
    shares = [
        share_of(positions, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)
        for rank in range(world_size)
    ]

    assert [p for share in shares for micro in share for p in micro] == list(positions)
    assert len({len(share) for share in shares}) == 1
    assert all(len(micro) <= micro_batch_size for share in shares for micro in share)
    sizes = [sum(len(micro) for micro in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    # No more rounds than the largest share needs.
    assert len(shares[0]) == -(-max(sizes) // micro_batch_size)


def test_sizes_of_a_split_differ_by_one_at_most():
    assert split_evenly(512, 3) == [171, 171, 170]
    assert split_evenly(2, 4) == [1, 1, 0, 0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 20])
def test_every_world_trains_the_same_batches_in_the_same_order(world_size):
    order = Permutation(103, seed=5, epoch=0).take(range(103)).tolist()
    trained = run_steps(world_of(world_size, seed=5), 7)

    assert trained == [(0, order[start : start + 16]) for start in range(0, 103, 16)]


@pytest.mark.parametrize("num_samples", [16, 2])
@pytest.mark.parametrize("world_size", [1, 3, 4, 7])
def test_the_averaged_gradient_is_that_of_the_mean_over_the_global_batch(world_size, num_samples):
    inputs = torch.randn(num_samples, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradient(batches):
        weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
        for micro in batches:
            ((inputs[micro.indices] @ weight) ** 2).sum().mul(micro.loss_scale).backward()
        return weight.grad

    weight = torch.ones(5, dtype=torch.float64, requires_grad=True)
    ((inputs @ weight) ** 2).mean().backward()
    # As DDP does: the mean over the ranks.
    shares = [next(iter(sampler)) for sampler in world_of(world_size, num_samples)]
    averaged = torch.stack([gradient(share) for share in shares]).mean(0)

    # One changed order of a sum of 16 numbers of about 10.
    torch.testing.assert_close(averaged, weight.grad, rtol=1e-13, atol=1e-13)


def test_a_worker_with_an_empty_share_gets_a_stand_in_of_weight_zero_from_the_same_batch():
    shares = [next(iter(sampler)) for sampler in world_of(4, 2)]

    assert [len(share) for share in shares] == [1, 1, 1, 1]
    assert [micro.is_padding for share in shares for micro in share] == [False, False, True, True]
    assert [micro.loss_scale for share in shares for micro in share] == [2.0, 2.0, 0.0, 0.0]
    assert shares[2].micro_batches[0].indices == shares[0].micro_batches[0].indices
    assert sorted(trained_by(shares)) == [0, 1]


def test_drop_last_leaves_out_what_does_not_fill_a_batch_and_nothing_else():
    dropping, keeping = world_of(2, drop_last=True), world_of(2)

    assert (len(dropping[0]), len(keeping[0])) == (6, 7)
    assert [e for e, _ in run_steps(dropping, 13)] == [0] * 6 + [1] * 6 + [2]
    assert [len(samples) for _, samples in run_steps(keeping, 7)] == [16] * 6 + [7]
    assert (dropping[0].samples, keeping[0].samples) == (13 * 16, 103)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 120),
    global_batch_size=st.integers(1, 40),
    drop_last=st.booleans(),
    lives=st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(0, 12), st.integers(0, 12)), min_size=2, max_size=6
    ),
)
def test_killed_at_any_step_and_resumed_by_any_world_no_sample_is_missed_or_trained_twice(
    length, global_batch_size, drop_last, lives
):
    """A life: workers, micro-batch size, steps up to its save, steps after it that are lost with the kill."""
    drop_last = drop_last and global_batch_size <= length
    epoch_size = length - length % global_batch_size if drop_last else length
    saved, trained = None, []
    for world_size, micro_batch_size, num_saved, num_lost in lives:
        samplers = world_of(
            world_size,
            length,
            saved=saved,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            drop_last=drop_last,
            seed=3,
        )
        trained += run_steps(samplers, num_saved)
        assert len({str(sampler.state_dict()) for sampler in samplers}) == 1
        saved = samplers[0].state_dict()
        run_steps(samplers, num_lost)

    alone = world_of(1, length, global_batch_size=global_batch_size, drop_last=drop_last, seed=3)
    assert trained == run_steps(alone, len(trained))
    counts = Counter((epoch, sample) for epoch, samples in trained for sample in samples)
    assert set(counts.values()) <= {1}
    for epoch in range(saved["epoch"]):
        assert sum(e == epoch for e, _ in counts) == epoch_size
    assert saved["samples"] == len(counts)


def test_the_end_of_an_epoch_is_the_start_of_the_next_in_another_order():
    sampler = world_of(1, 32)[0]
    first = [trained_by([batch]) for batch in sampler if sampler.on_step(step=1) is None]

    assert (sampler.epoch, sampler.position, sampler.samples) == (1, 0, 32)
    second = [trained_by([batch]) for batch in sampler if sampler.on_step(step=1) is None]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(32))
    assert first != second


@pytest.mark.parametrize("num_counted", [0, 2])
def test_a_batch_that_is_not_counted_exactly_once_is_an_error_and_not_a_wrong_position(num_counted):
    sampler = world_of(1)[0]
    batches = iter(sampler)
    next(batches)
    for step in range(num_counted):
        sampler.on_step(step=step)

    with pytest.raises(RuntimeError, match=r"should stand at .*\(0, 16\).*exactly once"):
        next(batches)


def test_a_state_that_is_loaded_under_a_running_iterator_is_an_error():
    sampler = world_of(1)[0]
    for iterator in (iter(sampler), iter(sampler.micro_batches())):
        next(iterator)
        sampler.load_state_dict(sampler.state_dict())
        with pytest.raises(RuntimeError, match="restore first"):
            list(iterator)


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"length": 104}, "length"),
        ({"global_batch_size": 32}, "global_batch_size"),
        ({"drop_last": True}, "drop_last"),
    ],
)
def test_another_length_global_batch_or_drop_last_is_refused_by_name_and_nothing_is_loaded(changed, name):
    before = world_of(1)[0]
    run_steps([before], 3)
    sampler = world_of(1, **changed)[0]
    fresh = sampler.state_dict()

    with pytest.raises(StateMismatch, match=rf"{name} was \w+ and is {changed[name]}: .*allow_change=\['{name}'\]"):
        sampler.load_state_dict(before.state_dict())

    assert sampler.state_dict() == fresh


def test_a_global_batch_that_may_change_goes_on_at_the_position():
    before = world_of(1)[0]
    trained = run_steps([before], 3)
    sampler = world_of(3, saved=before.state_dict(), global_batch_size=32, allow_change=["global_batch_size"])
    trained += run_steps(sampler, 2)

    assert sorted(chain(*(samples for _, samples in trained))) == list(range(103))
    assert [len(samples) for _, samples in trained] == [16, 16, 16, 32, 23]


def test_a_length_that_may_change_ends_the_epoch_and_says_so():
    before = world_of(1)[0]
    run_steps([before], 3)
    sampler = world_of(1, 200, saved=before.state_dict(), allow_change=["length"])[0]

    assert (sampler.epoch, sampler.position, sampler.samples) == (1, 0, 48)
    assert sampler.changed_from(before.state_dict()) == ("length 103 -> 200", "epoch 0 ended early")


def test_another_length_at_the_start_of_an_epoch_ends_none():
    before = world_of(1)[0]
    run_steps([before], 7)
    assert (before.epoch, before.position) == (1, 0)
    sampler = world_of(1, 200, saved=before.state_dict(), allow_change=["length"])[0]

    assert (sampler.epoch, sampler.position, sampler.samples) == (1, 0, 103)
    assert sampler.changed_from(before.state_dict()) == ("length 103 -> 200",)


def test_another_drop_last_applies_to_the_end_of_this_epoch_and_checkpoints_without_it_are_read():
    before = world_of(1)[0]
    run_steps([before], 6)
    saved = before.state_dict()
    dropping = world_of(1, saved=saved, drop_last=True, allow_change=["drop_last"])[0]
    assert (dropping.epoch, dropping.position) == (1, 0)
    assert dropping.changed_from(saved) == ("drop_last False -> True", "epoch 0 ended early")

    del saved["drop_last"]
    assert len(world_of(1, saved=saved, drop_last=False)[0]) == 1


def test_the_report_calls_batches_exact_only_if_nothing_was_changed(tmp_path):
    before = world_of(1)[0]
    run_steps([before], 3)
    checkpoint.save({"batches": before}, step=3, run=str(tmp_path))

    def outcome(**given):
        report = checkpoint.restore({"batches": world_of(1, **given)[0]}, run=str(tmp_path))
        return report.parts[0].outcome, report.parts[0].details[0]

    assert outcome(micro_batch_size=2, seed=4)[0] == "exact"
    assert outcome(length=1200, allow_change=["length"]) == ("changed", "length 103 -> 1,200")
    changed = outcome(global_batch_size=40, allow_change=["global_batch_size"])
    assert changed == ("changed", "global_batch_size 16 -> 40")


def test_the_seed_is_the_checkpoints_and_the_line_of_the_report_says_where_the_run_is():
    before = GlobalBatchSampler(1_000_000, global_batch_size=512, micro_batch_size=8, seed=17)
    state = before.state_dict() | {"epoch": 1, "position": 614_400, "samples": 1_614_400}
    samplers = world_of(3, 1_000_000, saved=state, global_batch_size=512, micro_batch_size=8, seed=17)
    assert samplers[2].describe() == "epoch 1, sample 614,400 of 1,000,000; global batch 512 kept as 171 + 171 + 170"

    other = world_of(100, 1_000_000, saved=state, global_batch_size=512, seed=3)[0]
    assert other.describe().endswith("kept as 12 x 6 + 88 x 5; seed 17 of the checkpoint, not 3")
    assert other.seed == 17


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"length": 0}, "length=0"),
        ({"global_batch_size": 0}, "global_batch_size=0"),
        ({"micro_batch_size": -1}, "micro_batch_size=-1"),
        ({"length": 5, "drop_last": True}, "drop_last leaves nothing of length=5"),
        ({"rank": 3, "world_size": 3}, "rank=3 is not in a world of 3"),
        ({"rank": 0}, "rank=0 and world_size=None go together"),
        ({"world_size": 2}, "rank=None and world_size=2 go together"),
        ({"allow_change": ["seed"]}, "names nothing that could change"),
    ],
)
def test_arguments_that_leave_nothing_to_train_on_are_refused(given, match):
    with pytest.raises(ValueError, match=match):
        GlobalBatchSampler(**{"length": 100, "global_batch_size": 16, "micro_batch_size": 4} | given)


def test_integers_of_numpy_are_taken_as_those_of_python():
    given = {"global_batch_size": 16, "micro_batch_size": 3, "seed": 5, "rank": 0, "world_size": 1}
    sampler = GlobalBatchSampler(np.int64(103), **{name: np.int32(value) for name, value in given.items()})

    assert run_steps([sampler], 3) == run_steps(world_of(1, seed=5), 3)
    assert not any(isinstance(value, np.generic) for value in sampler.state_dict().values())


def test_what_is_done_before_the_last_step_of_an_epoch_is_done_once_wherever_the_run_is_killed(tmp_path):
    """The loop of docs/loop.md."""

    def train(run, num_epochs, killed_after=None):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        batches = GlobalBatchSampler(43, global_batch_size=10, micro_batch_size=10)
        state, trained = {"batches": batches, "scheduler": scheduler}, []
        with Checkpointer(state, run=str(run), every_n_steps=1, at_end=False) as checkpointer:
            checkpointer.restore()
            while batches.epoch < num_epochs:
                for batch in batches:
                    optimizer.step()
                    trained.append((batch.epoch, scheduler.get_last_lr()))
                    if len(batches) == 1:
                        scheduler.step()
                    checkpointer.step()
                    if checkpointer.step_count == killed_after:
                        return trained
        return trained

    alone = train(tmp_path / "alone", 2)
    assert alone == [(0, [1.0])] * 5 + [(1, [0.5])] * 5
    for step in range(1, 11):
        run = tmp_path / str(step)
        assert train(run, 2, killed_after=step) + train(run, 2) == alone
