"""DCP's save planner, without what it gets wrong.

Stock planning weighs a shard by the size of the whole tensor, so that replicated entries all go to the same few
ranks; it lets the values of one key differ between ranks, and keeps one of them; and it plans empty shards. Its plan
cache is keyed by the planner's class name, so that two models overwrite each other's plans: here it stays off.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections import ChainMap
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.tensor import DTensor

from ray_stateful.errors import UnsupportedState
from ray_stateful.format import values
from ray_stateful.format.checksums import checksum
from ray_stateful.format.chunks import Box, coverage_problems
from ray_stateful.format.dtypes import ITEM_BYTES, dtype_name
from ray_stateful.format.layout import is_of_one_rank
from ray_stateful.format.rows import MAX_PATH_LENGTH, KeyPath
from ray_stateful.storage.assignment import SMALL_BYTES, ListingPlan, ValueWriteData, assign, lengths_of
from ray_stateful.storage.staging import StagedTensors, Staging
from ray_stateful.storage.structure import (
    PLAIN_TENSORS,
    flatten,
    is_tensor,
    refuse_interleaved,
    refuse_wrapper,
    two_of,
)

_LONE_HALF = re.compile("[\ud800-\udfff]")


class BalancedSavePlanner(DefaultSavePlanner):
    """Plans to write each chunk once, spread over the ranks by the chunks' actual bytes."""

    def __init__(self) -> None:
        # Nobody makes a ShardedTensor of ShardedTensors any more, and looking for one passes over every entry.
        super().__init__(flatten_sharded_tensors=False)
        self.encoded: dict[str, str] = {}
        self.trees: dict[KeyPath, str] = {}
        self._paths: dict[str, KeyPath] = {}
        self.staged: StagedTensors | None = None

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Flatten `state_dict` as stock planners do, and keep what flattening loses.

        Raises:
            UnsupportedState: an entry can't be stored; names its key.
        """
        paths, leaves, trees = flatten(state_dict)
        self._paths = paths
        # DCP has an entry for each leaf of a tree too; everything else is flattened already, as DCP would do it.
        try:
            super().set_up_planner(trees, storage_meta, is_coordinator)
        except ValueError as error:
            key = str(error).removeprefix("duplicated flatten key ")
            raise (two_of(key) if key != str(error) else error) from error
        for key in self.state_dict.keys() & leaves.keys():
            raise two_of(key)
        self.state_dict = {**leaves, **self.state_dict}
        # DCP turns every dict key into a string; the paths in the index tell 1 from "1".
        below = {key: (*paths[str(steps[0])], *steps[1:]) for key, steps in self.mappings.items()}
        self.mappings = {**{key: paths[key] for key in leaves}, **below}
        for key, value in self.state_dict.items():
            _refuse_unsupported(key, self.mappings[key], value)
        # Values are encoded here and not when they are written: by then, training may have changed them.
        self.encoded = {
            key: values.encode(value, key) for key, value in self.state_dict.items() if not is_tensor(value)
        }
        self.trees = {paths[key]: values.encode(tree, key) for key, tree in trees.items() if key not in self.state_dict}

    def describe(self) -> Iterator[str]:
        """A text for each entry: all that this rank's part of the plan depends on."""
        words: dict[Any, str] = {}
        for key, value in self.state_dict.items():
            yield f"{key} {self.mappings[key]} {_described(value, words)}"

    def shared_values(self) -> dict[str, str]:
        """The JSON of the values that other ranks may have too, by key."""
        return {key: text for key, text in self.encoded.items() if not is_of_one_rank(self.mappings[key])}

    def shared_tensors(self) -> dict[str, str]:
        """A description of the small plain tensors that other ranks may have too, by key.

        Not DTensors: a rank outside of a DTensor's mesh has the DTensor as well, but plans nothing of it.
        """
        return {
            key: _described(value, {})
            for key, value in self.state_dict.items()
            if type(value) in PLAIN_TENSORS
            and value.numel() * value.element_size() <= SMALL_BYTES
            and not is_of_one_rank(self.mappings[key])
        }

    def create_local_plan(self) -> SavePlan:
        """This rank's chunks and values."""
        plan = super().create_local_plan()
        items = [self._with_checksum(item) for item in plan.items if not _is_empty_shard(item)]
        # DCP derives other plans from this one only by `dataclasses.replace`, which keeps the lengths.
        self.plan = ListingPlan(items, planner_data=plan.planner_data, lengths=lengths_of(self._paths.values()))
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """One plan per rank, so that every chunk is written once. Pure: the same plans give the same answer.

        The items of a rank's plan are objects of that rank's local plan, not copies, in the same order.

        Raises:
            UnsupportedState: ranks disagree on an entry.
            ValueError: the planned chunks do not cover some tensor exactly.
        """
        # An index hint, an item's place among the chunks of its tensor, would need a new item for each; nobody uses it.
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
        """Copy the tensors to `staging`; from here on, the copies are what is written."""
        self.staged = staging.fill(self.state_dict)

    def let_go(self) -> None:
        """Once all is planned, drop tensors that were copied: FSDP1 hands out clones, which take device memory."""
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


def _described(value: Any, words: dict[Any, str]) -> str:
    """Kind, shape, dtype and shards of an entry. `words` caches the texts of meshes and placements, which repeat."""
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
    return f"{tuple(value.shape)} {value.dtype}"


def _is_empty_shard(item: WriteItem) -> bool:
    """Whether a chunk has no elements, though its tensor has: the rank is beyond the end of a small dim."""
    data = item.tensor_data
    return data is not None and math.prod(data.chunk.sizes) == 0 and math.prod(data.size) > 0


def refuse_name(key: str, path: KeyPath) -> None:
    """Refuse what can't be the key and path of an entry: `UnsupportedState`."""
    if len(path) > MAX_PATH_LENGTH:
        found = f"an entry {len(path)} levels deep, of which an index has {MAX_PATH_LENGTH},"
        raise UnsupportedState(key, found, "flatten it")
    if not key.isascii() and _LONE_HALF.search(key) is not None:
        found = "an entry whose name is not valid Unicode (it has a lone surrogate)"
        raise UnsupportedState(ascii(key), found, "use a different name")


def _refuse_unsupported(key: str, path: KeyPath, value: Any) -> None:
    refuse_name(key, path)
    if not isinstance(value, torch.Tensor):
        return
    if isinstance(value, DTensor) and any(placement.is_partial() for placement in value.placements):
        raise UnsupportedState(
            key, f"a DTensor with placements {value.placements}", "reduce it first, to Replicate or Shard"
        )
    # Of a ShardedTensor torch answers no questions about its layout; its shards are dense.
    is_dense = isinstance(value, ShardedTensor) or values.is_dense(value)
    if not is_dense or dtype_name(value.dtype) not in ITEM_BYTES:
        kind = "nested" if value.is_nested else "meta" if value.is_meta else ""
        raise UnsupportedState(
            key,
            f"a {kind} tensor of layout {value.layout} and dtype {value.dtype}".replace("  ", " "),
            "give the part a state_dict() of dense tensors",
        )
    refuse_wrapper(key, value)
    refuse_interleaved(key, value)
