"""Which rank writes which entry, and what of a plan need not be sent for that.

Pure: no files, no collectives, no clock. The same plans give the same answer, on every rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import BytesIOWriteData, SavePlan, WriteItem

from ray_stateful.errors import UnsupportedState
from ray_stateful.format.dtypes import ITEM_BYTES, dtype_name
from ray_stateful.format.rows import KeyPath

# Tensors that are no shards, such as an optimizer's step counters, are small up to this size. Whichever rank writes one
# has little to write; and they lie together in its files, as one rank reads them for all.
SMALL_BYTES = 4 << 10

# So many lie together at least: in the files of many ranks they would be as many requests.
_TOGETHER = 1000


@dataclasses.dataclass(frozen=True)
class ValueWriteData(BytesIOWriteData):
    """What a plan says of a value: its size as JSON, and a checksum to compare with the other ranks'."""

    xxh3: str = ""


@dataclasses.dataclass(frozen=True)
class ListingPlan(SavePlan):
    """A plan with the lengths of the lists in which tensors are, by key: items have their positions, and no length."""

    lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)


def lengths_of(paths: Iterable[KeyPath]) -> dict[str, int]:
    """The lengths of the lists that `paths` lead through, by key."""
    lengths: dict[str, int] = {}
    for path in paths:
        for depth, step in enumerate(path):
            if type(step) is int:
                key = ".".join(map(str, path[:depth]))
                lengths[key] = max(lengths.get(key, 0), step + 1)
    return lengths


def assign(all_plans: Sequence[SavePlan]) -> list[SavePlan]:
    """Leave each entry that several ranks hold with one of them: the one with the fewest bytes to write.

    Raises:
        UnsupportedState: an entry is not the same on all ranks that have it: as a value, or by shape or dtype.
    """
    _refuse_different_lengths(all_plans)
    # By key alone: chunks that lie apart may be of tensors that are not one.
    of_key: dict[str, tuple[int, WriteItem]] = {}
    first: dict[MetadataIndex, tuple[int, WriteItem]] = {}
    # Of entries that several ranks have: of a model's shards mostly none, and there are many.
    holders: dict[MetadataIndex, list[int]] = {}
    for rank, plan in enumerate(all_plans):
        for item in plan.items:
            mine = (rank, item)
            # In line, as there are millions.
            known, data = of_key.setdefault(item.index.fqn, mine)[1].tensor_data, item.tensor_data
            if data is not known and (
                data is None
                or known is None
                or data.size != known.size
                or data.properties.dtype is not known.properties.dtype
            ):
                raise _different(of_key[item.index.fqn], mine)
            earliest = first.setdefault(item.index, mine)
            if earliest is not mine:
                _refuse_different_values(earliest, mine)
                holders.setdefault(item.index, [earliest[0]]).append(rank)
    if not holders:
        return list(all_plans)
    # What one rank alone can write comes first. Then largest first; ties are broken by name and offset, never by set
    # order: a resumed run must lay its files out as the first one did, or two checkpoints of one state can't be
    # compared.
    loads = [sum(item_bytes(item) for item in plan.items if item.index not in holders) for plan in all_plans]
    writers: dict[MetadataIndex, int] = {}
    for index in sorted(holders, key=lambda i: (-item_bytes(first[i][1]), i.fqn, tuple(i.offset or ()))):
        writers[index] = min(holders[index], key=lambda candidate: (loads[candidate], candidate))
        loads[writers[index]] += item_bytes(first[index][1])
    return [
        dataclasses.replace(plan, items=[item for item in plan.items if writers.get(item.index, rank) == rank])
        for rank, plan in enumerate(all_plans)
    ]


def deal(tensors: Iterable[str], values: Mapping[str, str], world_size: int) -> dict[str, int]:
    """Which rank writes which of the entries that all ranks have: small tensors by key, and values with their JSON.

    Every rank computes the same, and nobody need be asked. Pure.
    """
    # The last ranks: where a dim does not divide by the number of ranks, they have the least of it.
    writers = {key: world_size - 1 - at // _TOGETHER % world_size for at, key in enumerate(sorted(tensors))}
    largest_first = sorted(values, key=lambda key: (-len(values[key]), key))
    return writers | {key: at % world_size for at, key in enumerate(largest_first)}


def leave(plan: SavePlan, writers: Mapping[str, int], rank: int) -> SavePlan:
    """This rank's plan without the entries of which another one is the writer."""
    mine = {key for key, writer in writers.items() if writer == rank}
    theirs = writers.keys() - mine
    items = [item for item in plan.items if item.index.fqn not in theirs]
    # Whoever deals out what is not planned everywhere would lose it.
    assert mine <= {item.index.fqn for item in items}
    paths = {key: path for key, path in (plan.planner_data or {}).items() if key not in theirs}
    return dataclasses.replace(plan, items=items, planner_data=paths)


def left_out(plan: SavePlan, final: SavePlan) -> list[int]:
    """The positions of a plan's items that are not in the final one: mostly none, where there are many items."""
    kept = iter(final.items)
    following = next(kept, None)
    positions = []
    for position, item in enumerate(plan.items):
        if item is following:
            following = next(kept, None)
        else:
            positions.append(position)
    # Of equal items that are others, none would be written.
    assert following is None
    return positions


def without(plan: SavePlan, positions: list[int]) -> SavePlan:
    """The final plan, on the rank whose plan it is: the inverse of `left_out`."""
    others = set(positions)
    return dataclasses.replace(plan, items=[item for at, item in enumerate(plan.items) if at not in others])


def item_bytes(item: WriteItem) -> int:
    """Bytes of the chunk (not of the tensor it is part of), or of the value."""
    if item.tensor_data is None:
        return item.bytes_io_data.nbytes if item.bytes_io_data is not None else 1
    return math.prod(item.tensor_data.chunk.sizes) * ITEM_BYTES[dtype_name(item.tensor_data.properties.dtype)]


def _refuse_different_values(first: tuple[int, WriteItem], other: tuple[int, WriteItem]) -> None:
    mine, theirs = other[1].bytes_io_data, first[1].bytes_io_data
    if isinstance(mine, ValueWriteData) and isinstance(theirs, ValueWriteData) and mine.xxh3 != theirs.xxh3:
        found = f"a value that is one thing on rank {first[0]} and another on rank {other[0]}"
        raise _of_no_rank(first[1].index.fqn, found)


def _refuse_different_lengths(plans: Sequence[SavePlan]) -> None:
    first: dict[str, tuple[int, int]] = {}
    for rank, plan in enumerate(plans):
        for key, length in plan.lengths.items() if isinstance(plan, ListingPlan) else ():
            earliest, expected = first.setdefault(key, (rank, length))
            if length != expected:
                # One of them would come back with entries of the other.
                raise _of_no_rank(key, f"a list of {expected} on rank {earliest} and of {length} on rank {rank}")


def _different(first: tuple[int, WriteItem], other: tuple[int, WriteItem]) -> UnsupportedState:
    (rank, item), (other_rank, other_item) = first, other
    found = f"{_kind(item)} on rank {rank} and {_kind(other_item)} on rank {other_rank}"
    return _of_no_rank(item.index.fqn, found)


def _kind(item: WriteItem) -> str:
    data = item.tensor_data
    if data is None:
        return "a value"
    return f"a tensor of shape {tuple(data.size)} and dtype {dtype_name(data.properties.dtype)}"


def _of_no_rank(key: str, found: str) -> UnsupportedState:
    return UnsupportedState(
        key,
        found,
        "make it the same, or derive the part from ray_stateful.states.part.RankPart, which has one value per rank",
    )
