"""Planning a 70B-parameter model's save for many ranks, in one process: at first, and once the structure is known.

The shapes are those of a Llama of 80 layers, sharded along dim 0, with Adam's moments and counters and the optimizer's
hyperparameters by parameter. Every rank's plan is real; no tensor is. What ranks send each other is pickled and
measured, and not sent. The index, of which every rank decodes all when it restores, is one rank's share of it, scaled.
"""

from __future__ import annotations

import functools
import math
import pickle
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from benchmarks.measuring import Ratio
from benchmarks.settings import Settings
from ray_stateful import collector
from ray_stateful.format import index, layout
from ray_stateful.format.checksums import block_bytes_for, checksum, num_blocks
from ray_stateful.format.chunks import Box
from ray_stateful.format.rows import StoredChunk
from ray_stateful.storage.assignment import ValueWriteData, deal, item_bytes, leave, left_out
from ray_stateful.storage.plan_cache import PlanCache, agree, entries_digest, structure_digest
from ray_stateful.storage.planner import BalancedSavePlanner

Row = dict[str, Any]

_LAYERS, _WIDTH, _HIDDEN, _KEYS, _VOCABULARY = 80, 8192, 28672, 1024, 128256
_VALUE = "0.001"
_HYPERPARAMETERS = (
    "amsgrad",
    "betas",
    "capturable",
    "decoupled_weight_decay",
    "differentiable",
    "eps",
    "foreach",
    "fused",
    "lr",
    "maximize",
    "weight_decay",
)


_FILE = layout.item_file(0, 0)


def run(settings: Settings) -> tuple[list[Row], list[Ratio]]:
    rows = [_plan(num_ranks) for num_ranks in settings.planning_ranks]
    for row in rows:
        print(
            f"  {row['num_ranks']:5d} ranks  {row['items_a_rank']:6d} items a rank"
            f"  cold: {row['cold_s']:8.2f} s on rank 0, {row['cold_bytes'] / 1e6:9.2f} MB sent"
            f"  warm: {row['warm_s'] * 1e3:8.1f} ms a rank, {row['warm_bytes']:7d} B sent"
            f"  index: {row['index_bytes'] / 1e6:8.2f} MB, {row['decode_s']:6.2f} s",
            flush=True,
        )
    first, last = rows[0], rows[-1]
    speed_ups = [row["cold_s"] / row["warm_s"] for row in rows]
    growth = last["warm_s"] / first["warm_s"]
    sent = [row["warm_bytes"] / row["num_ranks"] for row in rows]
    return rows, [
        Ratio("planning.warm_vs_cold", speed_ups[-1], min(speed_ups), max(speed_ups)),
        Ratio("planning.warm_growth_with_ranks", growth, growth, growth),
        Ratio("planning.warm_bytes_a_rank", sent[-1], min(sent), max(sent), 24, at_most=True),
    ]


def _plan(num_ranks: int) -> Row:
    entries = list(_entries())
    tensors = {key: "() torch.float32" for key, shape in entries if shape == ()}
    values = {key: _VALUE for key, shape in entries if shape is None}
    began = time.perf_counter()
    writers = deal(tensors, values, num_ranks)
    plans = [leave(_local_plan(entries, rank, num_ranks), writers, rank) for rank in range(num_ranks)]
    local_s = (time.perf_counter() - began) / num_ranks

    # Cold: every plan to rank 0, one plan for all, and what each leaves to others back. Pickling a plan is done on each
    # rank, unpickling on one.
    sent = [pickle.dumps(plan) for plan in plans]
    del plans
    began = time.perf_counter()
    with collector.paused():
        plans = [pickle.loads(plan) for plan in sent]
    unpickle_s = time.perf_counter() - began
    began = time.perf_counter()
    with collector.paused():
        finals, metadata = BalancedSavePlanner().create_global_plan(plans)
    left = [pickle.dumps(left_out(*pair)) for pair in zip(plans, finals, strict=True)]
    global_s = time.perf_counter() - began
    num_bytes = sum(map(len, [*sent, *left]))
    cold_s = unpickle_s + global_s

    # Warm: the same on every rank: digests of its own state, gathered, compared.
    cache = PlanCache()
    descriptions = [_description(key, shape, num_ranks) for key, shape in entries]
    found = [structure_digest(descriptions, num_ranks), entries_digest(tensors), entries_digest(values)]
    cache.keep([found[0]] * num_ranks, finals[0], metadata)
    share = index.to_bytes(_rows(plans[num_ranks // 2]))
    began = time.perf_counter()
    with collector.paused():
        index.from_bytes(share, "", {_FILE: 1 << 62})
    decode_s = (time.perf_counter() - began) * num_ranks

    began = time.perf_counter()
    descriptions = [_description(key, shape, num_ranks) for key, shape in entries]
    mine = [structure_digest(descriptions, num_ranks), entries_digest(tensors), entries_digest(values)]
    everyone = [mine] * num_ranks
    cached = cache.find([structure for structure, *_ in everyone])
    assert cached is not None
    assert agree([of_values for *_, of_values in everyone])
    warm_s = time.perf_counter() - began
    return {
        "part": "planning",
        "num_ranks": num_ranks,
        "items_a_rank": len(entries),
        "items_sent_a_rank": len(plans[num_ranks // 2].items),
        "local_plan_s": local_s,
        "cold_s": cold_s,
        "unpickle_s": unpickle_s,
        "global_plan_s": global_s,
        "cold_bytes": num_bytes,
        "warm_s": warm_s,
        "warm_bytes": 8 * len(mine) * num_ranks,
        "index_bytes": len(share) * num_ranks,
        "decode_s": decode_s,
    }


def _entries() -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Key and shape of every entry; a value has none."""
    for name, shape in _parameters():
        yield f"model.{name}", shape
        yield f"optimizer.optim.state.{name}.exp_avg", shape
        yield f"optimizer.optim.state.{name}.exp_avg_sq", shape
        yield f"optimizer.optim.state.{name}.step", ()
        for hyperparameter in _HYPERPARAMETERS:
            yield f"optimizer.optim.param_groups.{name}.{hyperparameter}", None


def _parameters() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (_VOCABULARY, _WIDTH)
    yield "lm_head.weight", (_VOCABULARY, _WIDTH)
    yield "model.norm.weight", (_WIDTH,)
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight", (_WIDTH, _WIDTH)
        yield f"{prefix}.self_attn.k_proj.weight", (_KEYS, _WIDTH)
        yield f"{prefix}.self_attn.v_proj.weight", (_KEYS, _WIDTH)
        yield f"{prefix}.self_attn.o_proj.weight", (_WIDTH, _WIDTH)
        yield f"{prefix}.mlp.gate_proj.weight", (_HIDDEN, _WIDTH)
        yield f"{prefix}.mlp.up_proj.weight", (_HIDDEN, _WIDTH)
        yield f"{prefix}.mlp.down_proj.weight", (_WIDTH, _HIDDEN)
        yield f"{prefix}.input_layernorm.weight", (_WIDTH,)
        yield f"{prefix}.post_attention_layernorm.weight", (_WIDTH,)


def _description(key: str, shape: tuple[int, ...] | None, num_ranks: int) -> str:
    """What `BalancedSavePlanner.describe` says of a DTensor that is sharded along dim 0 of one mesh axis."""
    path = tuple(key.split(".", 1))
    if shape is None:
        return f"{key} {path} value"
    return f"{key} {path} {shape} torch.float32 (Shard(dim=0),) ('dp',) ({num_ranks},) {num_ranks:016x} [0]"


@functools.cache
def _value(key: str) -> WriteItem:
    # The same object on every simulated rank: there would be ten million of them.
    data = ValueWriteData(nbytes=len(_VALUE), xxh3=checksum(_VALUE.encode()))
    return WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO, bytes_io_data=data)


def _local_plan(entries: list[tuple[str, tuple[int, ...] | None]], rank: int, num_ranks: int) -> SavePlan:
    """What `create_local_plan` returns on this rank for DTensors sharded along dim 0."""
    properties = TensorProperties(dtype=torch.float32)
    items = []
    for key, shape in entries:
        if shape is None:
            items.append(_value(key))
            continue
        offsets, sizes = (0,) * len(shape), shape
        if shape:
            share = -(-shape[0] // num_ranks)
            first = min(shape[0], rank * share)
            offsets = (first, *offsets[1:])
            sizes = (min(shape[0], first + share) - first, *shape[1:])
            if not sizes[0]:
                continue
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        tensor = TensorWriteData(chunk=chunk, properties=properties, size=torch.Size(shape))
        kind = WriteItemType.SHARD if shape else WriteItemType.TENSOR
        items.append(WriteItem(index=MetadataIndex(key, torch.Size(offsets)), type=kind, tensor_data=tensor))
    return SavePlan(items, planner_data={key: (key,) for key, _ in entries})


def _rows(plan: SavePlan) -> list[StoredChunk]:
    """The rows of the index for a rank's items, one behind the other in one file."""
    rows, position = [], 0
    for item in plan.items:
        data, num_bytes = item.tensor_data, item_bytes(item)
        sizes, shape = ((), ()) if data is None else (tuple(data.chunk.sizes), tuple(data.size))
        block_bytes = block_bytes_for(num_bytes if data is None else 4 * math.prod(shape))
        row = StoredChunk(
            key=item.index.fqn,
            path=(item.index.fqn,),
            dtype=None if data is None else "float32",
            shape=shape,
            box=Box(() if data is None else tuple(data.chunk.offsets), sizes),
            file=_FILE,
            item_offset=position,
            item_length=num_bytes,
            data_offset=position,
            block_bytes=block_bytes,
            checksums=bytes(8 * num_blocks(num_bytes, block_bytes)),
            value=_VALUE if data is None else None,
        )
        rows.append(row)
        position += num_bytes
    return rows
