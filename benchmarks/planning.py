"""Planning a 70B-parameter model's save for many ranks, in one process: at first, and once the structure is known.

The shapes are those of a Llama of 80 layers, sharded along dim 0, with Adam's moments and counters and the optimizer's
hyperparameters by parameter. Every rank's plan is real; no tensor is. What ranks send each other is pickled and
measured, and not sent; rank 0 unpickles some of the plans, and the time is scaled to all of them.
"""

from __future__ import annotations

import functools
import pickle
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from benchmarks.measuring import Ratio
from benchmarks.settings import Settings
from ray_stateful.format.checksums import checksum
from ray_stateful.storage.plan_cache import PlanCache, agree, structure_digest, values_digests
from ray_stateful.storage.planner import BalancedSavePlanner, ValueWriteData

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


_NUM_UNPICKLED = 4


def run(settings: Settings) -> tuple[list[Row], list[Ratio]]:
    rows = [_plan(num_ranks) for num_ranks in settings.planning_ranks]
    for row in rows:
        print(
            f"  {row['num_ranks']:5d} ranks  {row['items_a_rank']:6d} items a rank"
            f"  cold: {row['cold_s']:8.2f} s on rank 0, {row['cold_bytes'] / 1e6:9.2f} MB sent"
            f"  warm: {row['warm_s'] * 1e3:8.1f} ms a rank, {row['warm_bytes']:7d} B sent",
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
    began = time.perf_counter()
    plans = [_local_plan(entries, rank, num_ranks) for rank in range(num_ranks)]
    local_s = (time.perf_counter() - began) / num_ranks

    # Cold: every plan to rank 0, one plan for all, and back. Pickling a plan is done on each rank, unpickling on one.
    sent = pickle.dumps(plans[-1])
    began = time.perf_counter()
    for _ in range(_NUM_UNPICKLED):
        pickle.loads(sent)
    unpickle_s = (time.perf_counter() - began) * num_ranks / _NUM_UNPICKLED
    began = time.perf_counter()
    finals, metadata = BalancedSavePlanner().create_global_plan(plans)
    global_s = time.perf_counter() - began
    num_bytes = num_ranks * (len(sent) + len(pickle.dumps(finals[-1])))
    cold_s = unpickle_s + global_s

    # Warm: the same on every rank: digests of its own state, gathered, compared.
    cache = PlanCache()
    descriptions = [_description(key, shape, num_ranks) for key, shape in entries]
    texts = [(key, _VALUE) for key, shape in entries if shape is None]
    found = [structure_digest(descriptions, num_ranks), *values_digests(texts)]
    cache.keep([found[0]] * num_ranks, finals[0], metadata)
    began = time.perf_counter()
    descriptions = [_description(key, shape, num_ranks) for key, shape in entries]
    mine = [structure_digest(descriptions, num_ranks), *values_digests(texts)]
    everyone = [mine] * num_ranks
    cached = cache.find([structure for structure, *_ in everyone])
    assert cached is not None
    assert agree([(names, contents) for _, names, contents in everyone])
    warm_s = time.perf_counter() - began
    return {
        "part": "planning",
        "num_ranks": num_ranks,
        "items_a_rank": len(plans[0].items),
        "local_plan_s": local_s,
        "cold_s": cold_s,
        "unpickle_s": unpickle_s,
        "global_plan_s": global_s,
        "cold_bytes": num_bytes,
        "warm_s": warm_s,
        "warm_bytes": 8 * len(mine) * num_ranks,
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
