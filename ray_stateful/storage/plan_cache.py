"""Plans that are used again: planning gathers every rank's entries on one rank, and the answer is the same each time.

A plan holds for one structure: keys, shapes, dtypes, shards, world size. All of it goes into a digest, and the
digests of all ranks, not the number of a save or the name of a class, say whether a plan may be used again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType

from ray_stateful.format.checksums import RunningChecksum
from ray_stateful.format.layout import is_rank_key


@dataclass(frozen=True, slots=True)
class CachedPlan:
    """What planning came to: this rank's items, and on rank 0 what there is altogether."""

    plan: SavePlan
    metadata: Metadata | None


class PlanCache:
    """The last plan of one state."""

    def __init__(self) -> None:
        self._digests: tuple[int, ...] | None = None
        self._cached: CachedPlan | None = None

    def find(self, digests: Sequence[int]) -> CachedPlan | None:
        """The plan for ranks of these structures; the same answer on every rank, as all of them kept it together."""
        return self._cached if tuple(digests) == self._digests else None

    def keep(self, digests: Sequence[int], plan: SavePlan, metadata: Metadata | None) -> None:
        self._digests, self._cached = tuple(digests), CachedPlan(plan, metadata)


def structure_digest(plan: SavePlan, world_size: int) -> int:
    """63 bits of what this rank's part of the plan depends on."""
    digest = RunningChecksum()
    digest.update(f"{world_size}".encode())
    for item in plan.items:
        data = item.tensor_data
        chunk = None if data is None else (tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        tensor = None if data is None else (tuple(data.size), str(data.properties.dtype))
        path = None if plan.planner_data is None else plan.planner_data.get(item.index.fqn)
        digest.update(repr((item.index.fqn, item.type.value, chunk, tensor, path)).encode())
    return int(digest.hexdigest(), 16) >> 1


def values_digests(plan: SavePlan) -> tuple[int, int]:
    """63 bits of the names of this rank's values, and 63 bits of names and values; without those of this rank alone."""
    names, contents = RunningChecksum(), RunningChecksum()
    for item in plan.items:
        path = (plan.planner_data or {}).get(item.index.fqn, ())
        if item.type == WriteItemType.BYTE_IO and not (len(path) > 1 and is_rank_key(path[1])):
            names.update(f"{item.index.fqn};".encode())
            contents.update(f"{item.index.fqn}={getattr(item.bytes_io_data, 'xxh3', '')};".encode())
    return int(names.hexdigest(), 16) >> 1, int(contents.hexdigest(), 16) >> 1


def agree(digests: Sequence[tuple[int, int]]) -> bool:
    """Whether all ranks have the same values by name and content, from their `values_digests`.

    Ranks with other names (stages of a pipeline) may share some of them, and differ there: those are planned anew, as
    only the plans tell.
    """
    return len(set(digests)) == 1
