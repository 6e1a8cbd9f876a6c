"""The plans of many ranks for a 70B-parameter model's state, of which no tensor is there.

The shapes are those of a Llama of 80 layers, sharded along dim 0, with Adam's moments and counters and the optimizer's
hyperparameters by parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from ray_stateful.format.checksums import checksum
from ray_stateful.storage.assignment import ValueWriteData, deal, leave

_LAYERS, _WIDTH, _HIDDEN, _KEYS, _VOCABULARY = 80, 8192, 28672, 1024, 128256
VALUE = "0.001"
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

# A key and its shape; a value has none.
Entry = tuple[str, tuple[int, ...] | None]


def entries_of_model() -> Iterator[Entry]:
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


def plans_to_send(entries: Sequence[Entry], num_ranks: int) -> list[SavePlan]:
    """What each rank sends to be planned: all of its own, and of what all have what is dealt out to it."""
    tensors, values = shared_by_all(entries)
    writers = deal(tensors, values, num_ranks)
    return [leave(_local_plan(entries, rank, num_ranks), writers, rank) for rank in range(num_ranks)]


def shared_by_all(entries: Sequence[Entry]) -> tuple[dict[str, str], dict[str, str]]:
    """`BalancedSavePlanner.shared_tensors` and `shared_values` of such a state."""
    tensors = {key: "() torch.float32" for key, shape in entries if shape == ()}
    return tensors, {key: VALUE for key, shape in entries if shape is None}


@functools.cache
def _value(key: str) -> WriteItem:
    # The same object on every simulated rank: there would be ten million of them.
    data = ValueWriteData(nbytes=len(VALUE), xxh3=checksum(VALUE.encode()))
    return WriteItem(index=MetadataIndex(key), type=WriteItemType.BYTE_IO, bytes_io_data=data)


def _local_plan(entries: Sequence[Entry], rank: int, num_ranks: int) -> SavePlan:
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
