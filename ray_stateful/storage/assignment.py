"""Which rank writes which entry, and which parts of a plan need not be sent between ranks.

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

# Tensors that are not shards, such as an optimizer's step counters, count as small up to this size. It hardly matters
# which rank writes one. In a rank's files they lie next to each other, as one rank reads them for all.
SMALL_BYTES = 4 << 10

# Small tensors are dealt to ranks in runs of this many: spread over the files of many ranks, they would take one
# request per file.
_TOGETHER = 1000


@dataclasses.dataclass(frozen=True)
class ValueWriteData(BytesIOWriteData):
    """What a plan says about a value: its size as JSON, and a checksum to compare with the other ranks'."""

    xxh3: str = ""


@dataclasses.dataclass(frozen=True)
class ListingPlan(SavePlan):
    """A plan with the lengths, by key, of the lists that hold tensors: an item has its position in a list only."""

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
    """Assign each entry that several ranks hold to one of them: the one with the fewest bytes to write.

    Raises:
        UnsupportedState: an entry differs between the ranks that have it, in its value, shape or dtype.
    """
    _refuse_different_lengths(all_plans)
    # By key, not by chunk: ranks with different chunks of a key may still disagree about the whole tensor.
    of_key: dict[str, tuple[int, WriteItem]] = {}
    first: dict[MetadataIndex, tuple[int, WriteItem]] = {}
    # Only entries that several ranks have: a model has many shards, and mostly one rank has each.
    holders: dict[MetadataIndex, list[int]] = {}
    for rank, plan in enumerate(all_plans):
        for item in plan.items:
            mine = (rank, item)
            # Inlined rather than a function: there are millions of items.
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
    # What one rank alone can write is counted first. The rest is assigned largest first; ties are broken by name and
    # offset, never by set order: a resumed run must lay its files out as the first one did, or two checkpoints of one
    # state can't be compared.
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
    """The rank that writes each entry that all ranks have: small `tensors` by key, and `values` by key with their JSON.

    Pure: every rank computes the same answer without communication.
    """
    # From the last rank down: where a dim does not divide by the number of ranks, the last ranks have the least of it.
    writers = {key: world_size - 1 - at // _TOGETHER % world_size for at, key in enumerate(sorted(tensors))}
    largest_first = sorted(values, key=lambda key: (-len(values[key]), key))
    return writers | {key: at % world_size for at, key in enumerate(largest_first)}


def leave(plan: SavePlan, writers: Mapping[str, int], rank: int) -> SavePlan:
    """This rank's plan without the entries that a different rank writes."""
    mine = {key for key, writer in writers.items() if writer == rank}
    theirs = writers.keys() - mine
    items = [item for item in plan.items if item.index.fqn not in theirs]
    # An entry dealt to a rank that has not planned it would never be written.
    assert mine <= {item.index.fqn for item in items}
    paths = {key: path for key, path in (plan.planner_data or {}).items() if key not in theirs}
    return dataclasses.replace(plan, items=items, planner_data=paths)


def left_out(plan: SavePlan, final: SavePlan) -> list[int]:
    """The positions of the items of `plan` that are not in `final`: where there are many items, mostly none."""
    kept = iter(final.items)
    following = next(kept, None)
    positions = []
    for position, item in enumerate(plan.items):
        if item is following:
            following = next(kept, None)
        else:
            positions.append(position)
    # Items are matched by identity: equal copies in `final` would all count as left out, and never be written.
    assert following is None
    return positions


def without(plan: SavePlan, positions: list[int]) -> SavePlan:
    """The final plan, made again on the rank that has `plan`: the inverse of `left_out`."""
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
        found = f"a value that is not the same on rank {first[0]} and on rank {other[0]}"
        raise _of_no_rank(first[1].index.fqn, found)


def _refuse_different_lengths(plans: Sequence[SavePlan]) -> None:
    first: dict[str, tuple[int, int]] = {}
    for rank, plan in enumerate(plans):
        for key, length in plan.lengths.items() if isinstance(plan, ListingPlan) else ():
            earliest, expected = first.setdefault(key, (rank, length))
            if length != expected:
                # One rank's list would be restored with entries of the other's.
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
