"""What parts will be handed, in time that grows with the checkpoint and not with its square."""

from __future__ import annotations

from dataclasses import replace

from attacks import victim
from ray_stateful import filling
from ray_stateful.format.rows import tree_row
from ray_stateful.runs import DirectoryRun
from ray_stateful.states.part import World
from ray_stateful.storage import opening
from ray_stateful.storage.uris import resolve


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
