"""Who writes what: DCP's planner, without what it gets wrong.

Stock planning weighs a shard by the size of the whole tensor, so that replicated entries all go to the same few
ranks; it lets the values of one key differ between ranks, and keeps one of them; and it plans empty shards. Its
cache of plans is keyed by the planner's class name, so that two models overwrite each other's plans: it stays off.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import BytesIOWriteData, SavePlan, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from ray_stateful.errors import UnsupportedState
from ray_stateful.format import values
from ray_stateful.format.checksums import checksum
from ray_stateful.format.chunks import Box, coverage_problems
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.index import KeyPath
from ray_stateful.format.layout import is_of_one_rank
from ray_stateful.storage.staging import StagedTensors, Staging
from ray_stateful.storage.structure import flatten, is_tensor, two_of

# Tensors that are no shards, such as an optimizer's step counters, are small up to this size. Whichever rank writes one
# has little to write; and they lie together in its files, as one rank reads them for all.
SMALL_BYTES = 4 << 10

# So many lie together at least: in the files of many ranks they would be as many requests.
_TOGETHER = 1000

_PLAIN = (torch.Tensor, torch.nn.Parameter)

_LONE_HALF = re.compile("[\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class ValueWriteData(BytesIOWriteData):
    """What a plan says of a value: its size as JSON, and a checksum to compare with the other ranks'."""

    xxh3: str = ""


class BalancedSavePlanner(DefaultSavePlanner):
    """Writes each tensor's chunks once, spread over the ranks by the bytes they really have."""

    def __init__(self) -> None:
        # A ShardedTensor of ShardedTensors is what nobody makes any more; looking for one passes over every entry.
        super().__init__(flatten_sharded_tensors=False)
        self.encoded: dict[str, str] = {}
        self.trees: dict[KeyPath, str] = {}
        self.staged: StagedTensors | None = None

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Flatten `state_dict` as stock planners do, and keep what flattening loses.

        Raises:
            UnsupportedState: an entry can't be stored; names its key.
        """
        paths, leaves, trees = flatten(state_dict)
        # DCP has an entry for each leaf of a tree as well; all else is flattened by now, as it would do it.
        super().set_up_planner(trees, storage_meta, is_coordinator)
        for key in self.state_dict.keys() & leaves.keys():
            raise two_of(key)
        self.state_dict = {**leaves, **self.state_dict}
        # DCP turns every dict key into a string; the paths in the index tell 1 from "1".
        below = {key: (*paths[str(steps[0])], *steps[1:]) for key, steps in self.mappings.items()}
        self.mappings = {**{key: paths[key] for key in leaves}, **below}
        for key, value in self.state_dict.items():
            _refuse_unsupported(key, value)
        # Encoded here and not when they are written: by then, training may have changed them.
        self.encoded = {
            key: values.encode(value, key) for key, value in self.state_dict.items() if not is_tensor(value)
        }
        self.trees = {paths[key]: values.encode(tree, key) for key, tree in trees.items() if key not in self.state_dict}

    def describe(self) -> Iterator[str]:
        """What this rank's part of the plan depends on, in words, for each entry."""
        words: dict[Any, str] = {}
        for key, value in self.state_dict.items():
            yield f"{key} {self.mappings[key]} {_described(value, words)}"

    def shared_values(self) -> dict[str, str]:
        """By key the JSON of the values that other ranks may have too."""
        return {key: text for key, text in self.encoded.items() if not is_of_one_rank(self.mappings[key])}

    def shared_tensors(self) -> dict[str, str]:
        """By key a word on the small plain tensors that other ranks may have too.

        Not DTensors: a rank outside of their mesh has one as well, and plans nothing of it.
        """
        return {
            key: _described(value, {})
            for key, value in self.state_dict.items()
            if type(value) in _PLAIN
            and value.numel() * value.element_size() <= SMALL_BYTES
            and not is_of_one_rank(self.mappings[key])
        }

    def create_local_plan(self) -> SavePlan:
        """This rank's chunks and values."""
        plan = super().create_local_plan()
        items = [self._with_checksum(item) for item in plan.items if not _is_empty_shard(item)]
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """One plan a rank, in which every chunk is written once. Pure: the same plans give the same answer.

        A plan has items of the rank's own plan, the very same objects, in the same order.

        Raises:
            UnsupportedState: ranks disagree on a value.
            ValueError: the planned chunks do not cover some tensor exactly.
        """
        # An item's place among the chunks of its tensor is a hint that nobody needs, and a new item for each.
        plans, metadata = create_default_global_save_plan(assign(all_plans), rewrite_index_hints=False)
        mappings = dict(ChainMap(*(plan.planner_data for plan in plans)))
        metadata = dataclasses.replace(metadata, planner_data=mappings)
        problems = [
            f"{key}: {problem}"
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            for problem in coverage_problems(entry.size, [Box(tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks])
        ]
        if problems:
            raise ValueError("the ranks' shards do not make up whole tensors:\n  " + "\n  ".join(problems))
        self.global_plan, self.metadata = plans, metadata
        return plans, metadata

    def stage(self, staging: Staging) -> None:
        """Copy the tensors; from here on the copies are what is written."""
        self.staged = staging.fill(self.state_dict)

    def let_go(self) -> None:
        """Once all is planned, forget what was copied: FSDP1 hands out clones, which take memory of their device."""
        if self.staged is not None:
            self.state_dict = {}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if self.staged is None or write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        offset = write_item.index.offset
        return self.staged.get(write_item.index.fqn, None if offset is None else tuple(offset))

    def _with_checksum(self, item: WriteItem) -> WriteItem:
        if item.type != WriteItemType.BYTE_IO:
            return item
        text = self.encoded[item.index.fqn]
        data = ValueWriteData(nbytes=len(text), xxh3=checksum(text.encode()))
        return dataclasses.replace(item, bytes_io_data=data)


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


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _described(value: Any, words: dict[Any, str]) -> str:
    """Kind, shape, dtype and shards of an entry. `words` keeps those of meshes and placements, which repeat."""
    if not is_tensor(value):
        return "value"
    if isinstance(value, DTensor):
        mesh, placements = value.device_mesh, value.placements
        if id(mesh) not in words:
            ranks = checksum(mesh.mesh.cpu().numpy().tobytes())
            words[id(mesh)] = f"{mesh.mesh_dim_names} {tuple(mesh.shape)} {ranks} {mesh.get_coordinate()}"
        if placements not in words:
            words[placements] = repr(placements)
        return f"{tuple(value.shape)} {value.dtype} {words[placements]} {words[id(mesh)]}"
    if isinstance(value, ShardedTensor):
        return repr(value.metadata())
    return f"{tuple(value.shape)} {value.dtype} {value.layout} {value.is_quantized}"


def _is_empty_shard(item: WriteItem) -> bool:
    """A chunk without elements of a tensor that has some: a rank beyond the end of a small dim."""
    data = item.tensor_data
    return data is not None and math.prod(data.chunk.sizes) == 0 and math.prod(data.size) > 0


def _refuse_unsupported(key: str, value: Any) -> None:
    if not key.isascii() and _LONE_HALF.search(key) is not None:
        raise UnsupportedState(ascii(key), "an entry of this name, which is no valid text,", "use another name")
    if not isinstance(value, torch.Tensor):
        return
    if isinstance(value, DTensor) and any(placement.is_partial() for placement in value.placements):
        raise UnsupportedState(
            key, f"a DTensor with placements {value.placements}", "reduce it first, to Replicate or Shard"
        )
    if not values.is_dense(value) or dtype_name(value.dtype) not in ITEM_BYTES:
        kind = "nested" if value.is_nested else "meta" if value.is_meta else ""
        raise UnsupportedState(
            key,
            f"a {kind} tensor of layout {value.layout} and dtype {value.dtype}".replace("  ", " "),
            "give the part a state_dict() of dense tensors",
        )


def _refuse_different_values(first_rank: int, first: WriteItem, other: WriteItem, rank: int) -> None:
    mine, theirs = other.bytes_io_data, first.bytes_io_data
    if isinstance(mine, ValueWriteData) and isinstance(theirs, ValueWriteData) and mine.xxh3 != theirs.xxh3:
        raise UnsupportedState(
            first.index.fqn,
            f"a value that is one thing on rank {first_rank} and another on rank {rank}",
            "derive the part from ray_stateful.states.part.RankPart, which has one value per rank",
        )
