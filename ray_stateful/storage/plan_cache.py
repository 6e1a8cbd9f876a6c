"""Keeps the last plan for later saves: planning gathers every rank's entries on one rank, and finds the same each time.

A plan holds for one structure: keys, shapes, dtypes, shards, world size. All of it goes into a digest, and the
digests of all ranks, not the number of a save or the name of a class, say whether a plan may be used again. The same
holds for the last commit: if each rank wrote to the places of its last save, only checksums and values of the index
differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from ray_stateful.format.checksums import digest_number
from ray_stateful.storage.commit import Committed


@dataclass(frozen=True, slots=True)
class CachedPlan:
    """The outcome of planning: this rank's plan, and on rank 0 the metadata of the whole checkpoint."""

    plan: SavePlan
    metadata: Metadata | None


class PlanCache:
    """The last plan of one state, and on rank 0 its last commit."""

    def __init__(self) -> None:
        self._digests: tuple[int, ...] | None = None
        self._cached: CachedPlan | None = None
        self._places: tuple[int, ...] | None = None
        self.committed: Committed | None = None

    def find(self, digests: Sequence[int]) -> CachedPlan | None:
        """The plan for ranks with these structures, if kept; the same answer on every rank, as all keep it together."""
        return self._cached if tuple(digests) == self._digests else None

    def keep(self, digests: Sequence[int], plan: SavePlan, metadata: Metadata | None) -> None:
        self._digests, self._cached = tuple(digests), CachedPlan(plan, metadata)

    def are_places(self, places: Sequence[int]) -> bool:
        """Whether all ranks wrote to the same places as for the last commit; the same answer on every rank."""
        return tuple(places) == self._places

    def keep_commit(self, places: Sequence[int], committed: Committed | None) -> None:
        """Keep a commit, once all ranks know that it succeeded: no index describes what a failed save wrote."""
        self._places, self.committed = tuple(places), committed


def structure_digest(descriptions: Iterable[str], world_size: int) -> int:
    """A 63-bit digest of what this rank's part of the plan depends on: each entry's description, and `world_size`."""
    return _digest([f"{world_size}", *descriptions])


def entries_digest(entries: Mapping[str, str]) -> int:
    """A 63-bit digest of entries that other ranks may have too: key to the text by which they are compared."""
    return _digest(f"{key}={text}" for key, text in entries.items())


def _digest(texts: Iterable[str]) -> int:
    # Joined by a byte that no UTF-8 text has: different lists never give the same bytes.
    return digest_number(b"\xff".join(text.encode("utf-8", "surrogatepass") for text in texts))


def agree(digests: Sequence[int]) -> bool:
    """Whether all ranks have the same entries, from their `entries_digest`s.

    Ranks with different keys (stages of a pipeline) do not agree. They may share some keys, and have different entries
    there: only comparing their plans tells.
    """
    return len(set(digests)) == 1
