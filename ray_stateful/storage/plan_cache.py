"""Plans that are used again: planning gathers every rank's entries on one rank, and the answer is the same each time.

A plan holds for one structure: keys, shapes, dtypes, shards, world size. All of it goes into a digest, and the
digests of all ranks, not the number of a save or the name of a class, say whether a plan may be used again. So it is
with what was committed: where each rank wrote what it wrote before, an index differs in its checksums and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from ray_stateful.format.checksums import checksum
from ray_stateful.storage.commit import Committed


@dataclass(frozen=True, slots=True)
class CachedPlan:
    """What planning came to: this rank's items, and on rank 0 what there is altogether."""

    plan: SavePlan
    metadata: Metadata | None


class PlanCache:
    """The last plan of one state, and on rank 0 what was committed by it."""

    def __init__(self) -> None:
        self._digests: tuple[int, ...] | None = None
        self._cached: CachedPlan | None = None
        self._places: tuple[int, ...] | None = None
        self.committed: Committed | None = None

    def find(self, digests: Sequence[int]) -> CachedPlan | None:
        """The plan for ranks of these structures; the same answer on every rank, as all of them kept it together."""
        return self._cached if tuple(digests) == self._digests else None

    def keep(self, digests: Sequence[int], plan: SavePlan, metadata: Metadata | None) -> None:
        self._digests, self._cached = tuple(digests), CachedPlan(plan, metadata)

    def are_places(self, places: Sequence[int]) -> bool:
        """Whether all ranks wrote where they did for the last commit; the same answer on every rank."""
        return tuple(places) == self._places

    def keep_commit(self, places: Sequence[int], committed: Committed | None) -> None:
        """Only when all ranks know that it is committed: what a failed save wrote is not what the index tells of."""
        self._places, self.committed = tuple(places), committed


def structure_digest(descriptions: Iterable[str], world_size: int) -> int:
    """63 bits of what this rank's part of the plan depends on, a description for each entry."""
    return _digest([f"{world_size}", *descriptions])


def entries_digest(entries: Mapping[str, str]) -> int:
    """63 bits of entries that other ranks may have too, of each its key and what is compared of it."""
    return _digest(f"{key}={text}" for key, text in entries.items())


def _digest(texts: Iterable[str]) -> int:
    # A byte that no UTF-8 text has: two lists that differ are not the same when they are joined.
    return int(checksum(b"\xff".join(text.encode("utf-8", "surrogatepass") for text in texts)), 16) >> 1


def agree(digests: Sequence[int]) -> bool:
    """Whether all ranks have the same entries, from their `entries_digest`s.

    Ranks with other names (stages of a pipeline) may share some of them, and differ there: only their plans tell.
    """
    return len(set(digests)) == 1
