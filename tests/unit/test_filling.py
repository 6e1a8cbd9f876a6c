"""What parts will be handed, in time that grows with the checkpoint and not with its square."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks import victim
from ray_stateful import checkpoint, filling
from ray_stateful.errors import DamagedCheckpoint
from ray_stateful.format.rows import tree_row
from ray_stateful.runs import DirectoryRun
from ray_stateful.states.part import Reconciled, StrictPart, World
from ray_stateful.storage import opening
from ray_stateful.storage.uris import resolve


class Nested(StrictPart):
    """Its dicts have ints as keys, as those of torch's optimizers have; `extra` is only here."""

    def __init__(self, number, **extra):
        self.tensor, self.number, self.extra, self.given = torch.full((2,), float(number)), number, extra, None

    def state_dict(self):
        return {"state": {0: {"tensor": self.tensor, "number": self.number, **self.extra}}}

    def load_state_dict(self, state_dict):
        self.given = state_dict

    def reconcile(self, missing, unexpected):
        return Reconciled()


def test_a_strict_part_is_handed_the_keys_that_its_dicts_have_and_not_strings_in_their_place(tmp_path):
    checkpoint.save({"part": Nested(5)}, step=1, run=str(tmp_path))
    fresh = Nested(7, extra=8)
    checkpoint.restore({"part": fresh}, run=str(tmp_path))

    assert fresh.given == {"state": {0: {"tensor": fresh.tensor, "number": 5}}}
    assert torch.equal(fresh.tensor, torch.full((2,), 5.0))


class Divided(Nested):
    """One of its dicts is stored by key."""

    by_key = ("options",)

    def state_dict(self):
        return {"tensor": self.tensor, "options": {"number": self.number, **self.extra}}


def test_a_dict_that_is_stored_by_key_may_stand_beside_tensors(tmp_path):
    checkpoint.save({"part": Divided(5)}, step=1, run=str(tmp_path))
    fresh = Divided(7, extra=8)
    checkpoint.restore({"part": fresh}, run=str(tmp_path))

    assert fresh.given == {"tensor": fresh.tensor, "options": {"number": 5}}
    assert torch.equal(fresh.tensor, torch.full((2,), 5.0))


@pytest.mark.parametrize("entries", [["rank_0"], ["rank_0", "rank_2"], ["rank_0", "rank_1", "other"]])
def test_a_part_of_ranks_that_lacks_the_value_of_one_or_has_another_is_damage(tmp_path, entries):
    storage, path = resolve(str(victim.save(tmp_path)))
    opened = opening.parse(opening.fetch(storage, path))
    (row,) = opened.chunks["stream.rank_0.number"]
    rows = [replace(row, key=f"stream.{entry}.number", path=("stream", entry, "number")) for entry in entries]
    opened = replace(opened, chunks={row.key: (row,) for row in rows}, trees={})
    run = DirectoryRun(storage, str(tmp_path), str(tmp_path))
    world = World(saved_world_size=2, world_size=1, rank=0, step=1)

    with pytest.raises(DamagedCheckpoint, match="not one for each rank"):
        filling.fill_rank_part("stream", victim.PerRank(0), None, {}, world, run, opened)


class Counted(dict):
    """A dict that counts how often somebody goes through all of it."""

    times = 0

    def items(self):
        self.times += 1
        return super().items()

    def values(self):
        self.times += 1
        return super().values()


def test_values_of_many_ranks_are_found_without_going_through_all_for_each(tmp_path):
    storage, path = resolve(str(victim.save(tmp_path)))
    opened = opening.parse(opening.fetch(storage, path))
    (row,) = opened.chunks["stream.rank_0.number"]
    chunks = Counted(opened.chunks)
    for rank in range(200):
        key = f"stream.rank_{rank}.number"
        chunks[key] = (replace(row, key=key, path=("stream", f"rank_{rank}", "number")),)
    trees = Counted({"stream.rank_3.tree": tree_row(("stream", "rank_3", "tree"), "[1]")})
    opened = replace(opened, chunks=chunks, trees=trees)
    run = DirectoryRun(storage, str(tmp_path), str(tmp_path))
    world = World(saved_world_size=200, world_size=1, rank=0, step=1)

    filled = filling.fill_rank_part("stream", victim.PerRank(0), None, {}, world, run, opened)

    assert filled.value == {rank: {"number": 7} if rank != 3 else {"number": 7, "tree": [1]} for rank in range(200)}
    assert chunks.times + trees.times < 10
