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

# Tensors that are no shards, such as an optimizer's step counters, are small up to this size. Whichever rank writes one
# has little to write; and they lie together in its files, as one rank reads them for all.
SMALL_BYTES = 4 << 10

# So many lie together at least: in the files of many ranks they would be as many requests.
_TOGETHER = 1000


@dataclasses.dataclass(frozen=True)
class ValueWriteData(BytesIOWriteData):
    """What a plan says of a value: its size as JSON, and a checksum to compare with the other ranks'."""

    xxh3: str = ""


def assign(all_plans: Sequence[SavePlan]) -> list[SavePlan]:
    """Leave each entry that several ranks hold with one of them: the one with the fewest bytes to write.

    Raises:
        UnsupportedState: a value is not the same on all ranks that have it.
    """
    first: dict[MetadataIndex, tuple[int, WriteItem]] = {}
    # Of entries that several ranks have: of a model's shards mostly none, and there are many.
    holders: dict[MetadataIndex, list[int]] = {}
    for rank, plan in enumerate(all_plans):
        for item in plan.items:
            mine = (rank, item)
            earliest = first.setdefault(item.index, mine)
            if earliest is not mine:
                _refuse_different_values(*earliest, item, rank)
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


def _refuse_different_values(first_rank: int, first: WriteItem, other: WriteItem, rank: int) -> None:
    mine, theirs = other.bytes_io_data, first.bytes_io_data
    if isinstance(mine, ValueWriteData) and isinstance(theirs, ValueWriteData) and mine.xxh3 != theirs.xxh3:
        raise UnsupportedState(
            first.index.fqn,
            f"a value that is one thing on rank {first_rank} and another on rank {rank}",
            "derive the part from ray_stateful.states.part.RankPart, which has one value per rank",
        )
