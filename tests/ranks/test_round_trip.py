"""Every pair of save and restore sizes, bit for bit into freshly built objects."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ray_stateful import checkpoint
from ray_stateful.stateful_wrappers import ModelState, OptimizerState
from ray_stateful.testing import run_ranks


class Model(nn.Module):
    """Uneven (7 rows), empty (1 row) and whole shards, a scalar, a tied head, a frozen part, several dtypes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.narrow = nn.Parameter(torch.randn(1, 3))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, ids):
        hidden = self.frozen(self.body(self.embedding(ids))) * self.narrow.sum()
        return self.lm_head(hidden) * self.scale


def build(seed):
    torch.manual_seed(seed)
    model = Model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    # FSDP2 shards no scalars; it stays a plain parameter, the same on every rank.
    fully_shard(model, mesh=mesh, ignored_params={model.scale})
    decay = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=0.01
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 30], gamma=0.5)
    return model, optimizer, scheduler


def train(model, optimizer, scheduler, steps):
    for step in range(steps):
        torch.manual_seed(step)
        ids = torch.randint(0, 7, (2, 5))
        model(ids).square().mean().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        model.seen += 1


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value.detach().clone()


def snapshot(model, optimizer, scheduler):
    """Everything, whole, by name: what must be equal bit for bit."""
    tensors = {name: whole(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"{names[parameter]}.{key}": whole(torch.as_tensor(value)) for key, value in state.items()}
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return tensors, groups, scheduler.state_dict()


def state_of(objects):
    model, optimizer, scheduler = objects
    return {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer, scheduler)}


def save_one(run):
    objects = build(seed=1)
    train(*objects, steps=3)
    report = checkpoint.save(state_of(objects), step=3, samples=30, run=run)
    return report, snapshot(*objects)


def restore_one(runs):
    results = []
    for run in runs:
        objects = build(seed=2)
        report = checkpoint.restore(state_of(objects), run=run)
        results.append((str(report), report.step, snapshot(*objects)))
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of one checkpoint, saved by each number of ranks, with what was saved."""
    root = tmp_path_factory.mktemp("runs")
    return {n: (str(root / f"by_{n}"), run_ranks(n, save_one, str(root / f"by_{n}"))) for n in (1, 2, 3, 4)}


@pytest.mark.parametrize("restoring", [1, 2, 3, 4])
def test_every_pair_of_sizes_restores_bit_for_bit(saved, restoring):
    outcomes = run_ranks(restoring, restore_one, [run for run, _ in saved.values()])

    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        for (size, (_, originals)), (report, step, (tensors, groups, schedule)) in zip(
            saved.items(), outcome, strict=True
        ):
            _, (expected, expected_groups, expected_schedule) = originals[0]
            assert step == 3
            assert tensors.keys() == expected.keys()
            assert [name for name in expected if not torch.equal(tensors[name], expected[name])] == []
            assert groups == expected_groups
            assert schedule == expected_schedule
            assert f"written by {size}" in report


def rows_of_nothing(path):
    states = []
    for _ in range(2):
        model = nn.Linear(2, 3)
        model.nothing = nn.Parameter(torch.empty(3, 0))
        states.append({"model": ModelState(fully_shard(model))})
    saved, fresh = states
    checkpoint.save(saved, step=1, run=path)
    checkpoint.restore(fresh, run=path, verify="full")
    loaded = fresh["model"].state_dict()
    return [torch.equal(whole(loaded[key]), whole(value)) for key, value in saved["model"].state_dict().items()]


def test_a_sharded_parameter_whose_rows_have_no_elements_does_not_keep_the_others_from_being_saved(tmp_path):
    # FSDP2 keeps no rows of it, whatever its shape says.
    assert run_ranks(2, rows_of_nothing, str(tmp_path)) == [[True] * 3] * 2
