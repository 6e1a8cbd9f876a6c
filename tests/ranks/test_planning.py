"""What ranks send each other to plan a save, and what becomes of it."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ray_stateful import checkpoint
from ray_stateful.errors import SaveFailed
from ray_stateful.ranks import Ranks
from ray_stateful.stateful_wrappers import ModelState, OptimizerState
from ray_stateful.storage.planner import BalancedSavePlanner
from ray_stateful.testing import run_ranks
from tests.codes import FlatCodes
from tests.part import Part, opened


def save_watched(state, run):
    """Save, and return with the report the keys of this rank's plan, as it was sent."""
    sent, gather = [], Ranks.gather

    def watched(self, phase, value):
        if phase == "gather plans":
            sent.extend(item.index.fqn for item in value.items)
        return gather(self, phase, value)

    Ranks.gather = watched
    try:
        return checkpoint.save(state, step=1, run=run, timeout_s=30), sent
    finally:
        Ranks.gather = gather


def save_trained(run):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 3))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4, 6)).sum().backward()
    optimizer.step()
    report, sent = save_watched({"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}, run)
    return sent, {key: rows[0].dtype for key, rows in opened(report).chunks.items()}


def test_what_every_rank_has_is_sent_to_be_planned_by_one_of_them(tmp_path):
    outcomes = run_ranks(3, save_trained, str(tmp_path))

    dtypes = outcomes[0][1]
    senders = Counter(key for sent, _ in outcomes for key in sent)
    assert senders.keys() == dtypes.keys()
    shared = {key for key, dtype in dtypes.items() if dtype is None or key.endswith((".step", "num_batches_tracked"))}
    assert len(shared) > 60
    assert {senders[key] for key in shared} == {1}
    # The shards of rows are their rank's, whoever else has some.
    assert senders["model.0.weight"] == 3
    values = {key for key in shared if dtypes[key] is None}
    of_each = [len(values & set(sent)) for sent, _ in outcomes]
    assert max(of_each) - min(of_each) <= 1


def save_unlike(run, extra):
    """A state of which rank 2 is outside of a mesh, and rank 1 may have a small tensor more."""
    rank = dist.get_rank()
    mesh = DeviceMesh("cpu", [0, 1])
    inside = DTensor.from_local(torch.full((3,), 7.0), mesh, [Replicate()])
    value = {"a": torch.arange(3.0), "b": torch.tensor(2.0), "inside": inside, "rate": 0.5}
    report, _ = save_watched({"part": Part({**value, **(extra if rank == 1 else {})})}, run)
    fresh = Part({})
    restored = checkpoint.restore({"part": fresh}, run=run, timeout_s=30)
    assert restored.checkpoint == report.name
    found = {key: value.to_local() if isinstance(value, DTensor) else value for key, value in fresh.value.items()}
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in found.items()}


@pytest.mark.parametrize("extra", [{}, {"c": torch.tensor(3.0)}], ids=["a mesh of some ranks", "a tensor more"])
def test_what_not_every_rank_has_is_saved_as_well(tmp_path, extra):
    wanted = {"a": [0.0, 1.0, 2.0], "b": 2.0, "inside": [7.0, 7.0, 7.0], "rate": 0.5, **dict.fromkeys(extra, 3.0)}
    assert run_ranks(3, save_unlike, str(tmp_path), extra) == [wanted] * 3


def save_codes(run):
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    shard = DTensor.from_local(FlatCodes(torch.ones(2, 3, dtype=torch.int8), torch.tensor(0.5)), mesh, [Shard(0)])
    try:
        checkpoint.save({"part": Part({"weight": shard})}, step=1, run=run, timeout_s=30)
    except SaveFailed as error:
        return str(error)


def test_a_shard_whose_elements_are_in_other_tensors_is_refused_by_its_key(tmp_path):
    for outcome in run_ranks(2, save_codes, str(tmp_path)):
        assert "rank 1: UnsupportedState: part.weight: a FlatCodes" in outcome
    assert list(tmp_path.iterdir()) == []


def words_of_placements():
    """The words by which one shape and dtype is described, in five placements on two ranks."""
    meshes = [
        DeviceMesh("cpu", ranks, mesh_dim_names=(name,))
        for name, ranks in [("dp", [0, 1]), ("tp", [0, 1]), ("dp", [1, 0])]
    ]
    cases = [*((mesh, Shard(0)) for mesh in meshes), (meshes[0], Shard(1)), (meshes[0], Replicate())]
    words = set()
    for mesh, placement in cases:
        planner = BalancedSavePlanner()
        local = torch.zeros([2 if placement.is_shard(dim) else 4 for dim in range(2)])
        planner.set_up_planner({"part": {"t": DTensor.from_local(local, mesh, [placement])}})
        words.add(tuple(planner.describe()))
    return len(words)


def test_another_placement_or_mesh_of_a_tensor_is_described_by_other_words():
    assert run_ranks(2, words_of_placements) == [5, 5]


def save_cut(run):
    """Bytes of the checksums, and chunks, of one tensor that is cut along each of its dims."""
    mesh = DeviceMesh("cpu", list(range(dist.get_world_size())))
    whole = torch.arange(300_000.0).reshape(600, 500)
    cut = {f"dim{dim}": distribute_tensor(whole, mesh, [Shard(dim)]) for dim in (0, 1)}
    chunks = opened(checkpoint.save({"part": Part(cut)}, step=1, run=run, timeout_s=30)).chunks
    return [(sum(len(row.checksums) for row in rows), len(rows)) for rows in (chunks["part.dim0"], chunks["part.dim1"])]


def test_more_ranks_do_not_make_more_checksums(tmp_path):
    # Every rank has all of them when it restores.
    (alone, *_), (of_four, *_) = (run_ranks(num, save_cut, str(tmp_path / str(num))) for num in (1, 4))
    for (before, _), (after, num_chunks) in zip(alone, of_four, strict=True):
        assert num_chunks == 4
        assert before > 1000
        # The last block of a chunk is a short one.
        assert after <= before + 8 * num_chunks
