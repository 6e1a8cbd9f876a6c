"""The run's mathematics does not depend on the number of workers: a run that is resized follows one that is not."""

import os
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ray_stateful import checkpoint
from ray_stateful.stateful_wrappers import ModelState, OptimizerState
from ray_stateful.states.batches import GlobalBatchSampler
from ray_stateful.states.gradients import accumulate
from ray_stateful.states.progress import Progress
from ray_stateful.states.random import RandomState
from ray_stateful.testing import run_ranks

GLOBAL_BATCH = 32
# 15 full global batches and one of 2 samples, in which the third and fourth worker have no sample of their own.
LENGTH = 15 * GLOBAL_BATCH + 2
NUM_STEPS = 200
# In mid-epoch, at the end of one (80 and 160 are), and between the two.
LIVES = [(4, 40), (2, 80), (3, 115), (1, 160), (4, NUM_STEPS)]

generator = torch.Generator().manual_seed(0)
INPUTS = torch.randn(LENGTH, 6, dtype=torch.float64, generator=generator)
# Noise that can't be fitted keeps the losses away from zero, where relative errors mean nothing.
NOISE = torch.randn(LENGTH, 1, dtype=torch.float64, generator=generator)
TARGETS = 3 * INPUTS[:, :1].sin() + INPUTS[:, 1:2] * INPUTS[:, 2:3] + NOISE


def build(kind, dtype, seed, dropout=0.0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Dropout(dropout), nn.Linear(10, 1)).to(dtype)
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        model = DistributedDataParallel(model)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)


def losses_of(model, samples, dtype):
    # The clone is for FSDP2, which warns of an output that is a view.
    outputs = model(INPUTS[samples].to(dtype)).clone()
    return ((outputs - TARGETS[samples].to(dtype)) ** 2).squeeze(-1)


def parameters(model):
    values = [p.detach() for p in model.parameters()]
    return [v.full_tensor() if isinstance(v, DTensor) else v.clone() for v in values]


def train(run, kind, dtype, until, dropout=0.0):
    """From the newest checkpoint of `run` up to step `until`, and save."""
    # Another seed where there is a checkpoint: nothing but that makes the runs alike.
    model, optimizer = build(kind, dtype, 2 if os.path.isdir(run) else 1, dropout)
    batches = GlobalBatchSampler(LENGTH, global_batch_size=GLOBAL_BATCH, micro_batch_size=12, seed=7)
    progress = Progress()
    state = {
        "model": ModelState(model),
        "optimizer": OptimizerState(model, optimizer),
        "batches": batches,
        "progress": progress,
        "random": RandomState(seed=7),
    }
    report = checkpoint.restore(state, run=run)
    losses, trained = [], []
    while progress.step < until:
        for batch in batches:
            total = torch.zeros((), dtype=dtype)
            for micro in accumulate(model, batch):
                loss = losses_of(model, micro.indices, dtype).sum() * micro.loss_scale
                loss.backward()
                total += loss.detach()
                trained += [] if micro.is_padding else [(batch.epoch, index) for index in micro.indices]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total)
            progress.count(samples=batch.num_samples, epoch=batch.epoch)
            progress.on_step(step=progress.step + 1)
            batches.on_step(step=progress.step)
            if progress.step == until:
                break
    assert progress.samples == batches.samples
    checkpoint.save(state, step=until, samples=batches.samples, run=run)
    return global_means(losses), trained, parameters(model), str(report)


def train_naively(run, kind, dtype, until):
    """What one writes without the sampler: a DistributedSampler, a mean loss a worker, `start` batches skipped."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    model, optimizer = build(kind, dtype, seed=1)
    progress = Progress()
    state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer), "progress": progress}
    checkpoint.restore(state, run=run)
    losses, trained = [], []
    sampler = DistributedSampler(range(LENGTH), world_size, rank, seed=7)
    loader = DataLoader(TensorDataset(torch.arange(LENGTH)), batch_size=GLOBAL_BATCH // world_size, sampler=sampler)
    while progress.step < until:
        epoch, start = divmod(progress.step, len(loader))
        sampler.set_epoch(epoch)
        for number, (samples,) in enumerate(loader):
            if number < start:
                continue
            loss = losses_of(model, samples, dtype).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            trained += [(epoch, index) for index in samples.tolist()]
            progress.on_step(step=progress.step + 1)
            if progress.step == until:
                break
    checkpoint.save(state, step=until, run=run)
    return global_means(losses), trained, parameters(model), ""


def global_means(losses):
    means = torch.stack(losses).double()
    dist.all_reduce(means)
    return means / dist.get_world_size()


VARIANTS = {
    "ddp float64": (train, "ddp", torch.float64),
    "fsdp float64": (train, "fsdp", torch.float64),
    "ddp float32": (train, "ddp", torch.float32),
    "naive": (train_naively, "ddp", torch.float64),
}


def live(directory, until):
    return {name: way(f"{directory}/{name}", *given, until) for name, (way, *given) in VARIANTS.items()}


def run_through(directory, lives):
    """Every variant through `lives`, each life in processes of its own: losses, samples, final parameters, reports."""
    losses, trained, reports = ({name: [] for name in VARIANTS} for _ in range(3))
    for world_size, until in lives:
        outcomes = run_ranks(world_size, live, directory, until, timeout_s=240.0)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        for name in VARIANTS:
            losses[name].append(outcomes[0][name][0])
            trained[name] += [sample for outcome in outcomes for sample in outcome[name][1]]
            reports[name].append(outcomes[0][name][3])
    final = {name: outcomes[0][name][2] for name in VARIANTS}
    return {name: (torch.cat(losses[name]), trained[name], final[name], reports[name]) for name in VARIANTS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    resized = run_through(str(tmp_path_factory.mktemp("resized")), LIVES)
    steady = run_through(str(tmp_path_factory.mktemp("steady")), [(4, NUM_STEPS)])
    return resized, steady


def drift(ours, theirs):
    """The largest relative difference of a loss, and of the parameters relative to their norm."""
    (losses, _, params, _), (expected, _, expected_params, _) = ours, theirs
    assert len(losses) == len(expected) == NUM_STEPS
    apart = [((p - q).norm() / q.norm()).item() for p, q in zip(params, expected_params, strict=True)]
    return ((losses - expected).abs() / expected.abs()).max().item(), max(apart)


# Only the order of additions differs: some 1e-16 a step in float64, which AdamW carries on for 200 steps. In float32
# it is 1e-7 a step.
@pytest.mark.parametrize(
    ("name", "tolerance"),
    [("ddp float64", 1e-9), ("fsdp float64", 1e-9), ("ddp float32", 1e-4)],
)
def test_a_run_through_4_2_3_1_and_4_workers_follows_one_that_stayed_at_4(runs, name, tolerance):
    resized, steady = runs
    losses, params = drift(resized[name], steady[name])

    assert losses < tolerance
    assert params < tolerance
    # It did train, and the worlds did differ.
    assert steady[name][0][-24:-8].mean() < 0.5 * steady[name][0][:16].mean()
    assert losses > 0


@pytest.mark.parametrize("name", ["ddp float64", "fsdp float64"])
def test_every_sample_is_trained_exactly_once_in_every_epoch(runs, name):
    for run in runs:
        counts = Counter(run[name][1])

        assert set(counts.values()) == {1}
        per_epoch = Counter(epoch for epoch, _ in counts)
        assert [per_epoch[epoch] for epoch in range(13)] == [LENGTH] * 12 + [8 * GLOBAL_BATCH]


def test_the_report_says_what_became_of_the_batches_and_the_random_streams(runs):
    first, second, third, _, last = runs[0]["ddp float64"][3]

    assert first == "None"
    assert "epoch 2, sample 256 of 482; global batch 32 kept as 16 + 16" in second
    assert "epoch 5, sample 0 of 482; global batch 32 kept as 11 + 11 + 10" in third
    assert "2 streams saved, 3 workers: derived from (seed 7, step 80, rank)" in third
    assert "global batch 32 kept as 8 + 8 + 8 + 8" in last


def test_the_same_run_without_the_sampler_and_the_loss_scale_drifts(runs):
    resized, steady = runs
    losses, params = drift(resized["naive"], steady["naive"])

    # A million times what the sampler leaves, and samples trained twice.
    assert losses > 1e-3
    assert params > 1e-3
    assert max(Counter(resized["naive"][1]).values()) > 1


def interrupted(directory, stops):
    """With dropout, in one go or with a restart into fresh objects at each of `stops`."""
    results = [train(directory, "ddp", torch.float32, until, dropout=0.3) for until in stops]
    return torch.cat([losses for losses, *_ in results]), results[-1][2]


def test_at_equal_size_a_restart_changes_no_bit_dropout_included(tmp_path):
    once = run_ranks(2, interrupted, str(tmp_path / "once"), [NUM_STEPS // 4])
    often = run_ranks(2, interrupted, str(tmp_path / "often"), [7, 16, NUM_STEPS // 4])

    for (losses, params), (expected, expected_params) in zip(often, once, strict=True):
        assert torch.equal(losses, expected)
        assert all(torch.equal(p, q) for p, q in zip(params, expected_params, strict=True))
