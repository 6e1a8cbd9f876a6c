"""The names of a model's parameters, whatever it is wrapped in; and its output head. No collectives.

A canonical name is the one that a parameter had before DDP, FSDP1, `torch.compile` or activation checkpointing put a
module around a part of the model. State is stored under canonical names, so that what was saved with one wrapper
loads with a different one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

PREFIX = "model."
EXTRA_STATE = "_extra_state"

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# What models call the weight of their input embedding, which may be in a different stage of the pipeline.
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "tok_embeddings.weight", "word_embeddings.weight")


def drop_prefix(sd: dict[str, Any], prefix: str) -> None:
    """Strip `prefix` once, in place, from the keys that start with it."""
    _rename(sd, {key: key[len(prefix) :] for key in sd if key.startswith(prefix)})


def add_prefix(sd: dict[str, Any], prefix: str, skip_keys: Sequence[str]) -> None:
    """Put `prefix` once, in place, before the keys that lack it."""
    _rename(sd, {key: prefix + key for key in sd if not key.startswith(prefix) and key not in skip_keys})


def _rename(sd: dict[str, Any], renamed: Mapping[str, str]) -> None:
    owners: dict[str, str] = {}
    for key in sd:
        new = renamed.get(key, key)
        if new in owners:
            raise ValueError(
                f"keys {owners[new]!r} and {key!r} would both become {new!r}, and one of the two values would be "
                "lost; rename or remove one of them first"
            )
        owners[new] = key
    # All at once, after the check, so that a refusal does not leave the dict half renamed.
    values = {new: sd[key] for new, key in owners.items()}
    sd.clear()
    sd.update(values)


def canonical_name(model: nn.Module, name: str) -> str:
    """The name that parameter, buffer or state dict entry `name` of `model` has without any wrapper."""
    parts: list[str] = []
    module: Any = model
    for part in name.split("."):
        # By position, not by text: `module` and `_orig_mod` are fine names for a user's own submodules.
        wrapped = part in _WRAPPERS or (part == "module" and isinstance(module, DistributedDataParallel))
        if not wrapped:
            parts.append(part)
        module = getattr(module, part, None)
    return ".".join(parts)


def without_wrappers(name: str) -> str:
    """The canonical name that `name`, read from a file, most likely stands for.

    A guess: unlike in `canonical_name` there is no module to ask. For names that the model does not know as they are.
    """
    levels = [level for level in name.split(".") if level not in _WRAPPERS]
    return ".".join(levels[1:] if levels[:1] == ["module"] else levels)


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Canonical name and parameter; a shared parameter comes once under each of its names."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield canonical_name(model, name), parameter


def further_names(model: nn.Module) -> dict[str, str]:
    """For modules that are registered under several names: each further canonical name to the first one."""
    first: dict[nn.Module, str] = {}
    further: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if first.setdefault(module, name) != name:
            further[canonical_name(model, name)] = canonical_name(model, first[module])
    return further


def head_and_name(model: nn.Module) -> tuple[nn.Parameter, str] | tuple[None, None]:
    """The output head's parameter and its canonical name; `(None, None)` without a head."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        # A quick test first: a name does not come to contain `lm_head` by losing its wrappers.
        if "lm_head" in name and _is_head(canonical := canonical_name(model, name)):
            return parameter, canonical
    return None, None


def _is_head(name: str) -> bool:
    path = name.split(".")
    # An adapter of the head lives under it (`lm_head.lora_A.weight`), and is not the head.
    return "lm_head" in path and path[path.index("lm_head") + 1 :] in (["weight"], ["base_layer", "weight"])


def tied_head(model: nn.Module) -> tuple[str, str] | None:
    """The canonical names of the head and of the embedding it is tied to; `None` if it stands on its own.

    Only actual sharing counts. What configs say about tying is, in practice, wrong in both directions: if it were
    trusted, a head that was trained on its own could be lost.
    """
    for embedding, name in _shared_in_flat_parameters(model):
        if _is_head(name):
            return name, embedding
    head, head_name = head_and_name(model)
    if head is None or head_name is None:
        return None
    for name, parameter in named_parameters(model):
        if name != head_name and not _is_head(name) and _shares(head, parameter):
            return head_name, name
    return None


def _shared_in_flat_parameters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """First and further name of each shared parameter that FSDP1 flattened; it has the values only once."""
    for name, module in model.named_modules():
        # The handle is None where FSDP1 found nothing to shard.
        if isinstance(module, FullyShardedDataParallel) and module._handle is not None:
            for info in module._handle.flat_param._shared_param_infos:
                first = f"{info.prim_module_name}.{info.prim_param_name}"
                further = f"{info.module_name}.{info.param_name}"
                inside = f"{name}._fsdp_wrapped_module." if name else "_fsdp_wrapped_module."
                yield canonical_name(model, inside + first), canonical_name(model, inside + further)


def _shares(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one is other:
        return True
    # Shards are never compared by address: empty ones all have the address 0, on some ranks only, and the ranks
    # would come to different keys.
    if isinstance(one, DTensor) or isinstance(other, DTensor) or one.device.type == "meta" or one.numel() == 0:
        return False
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


def embedding_names(model: nn.Module, head_name: str) -> list[str]:
    """Names that the embedding of a head may have, the likeliest first; the embedding need not be in this `model`."""
    names: list[str] = []
    inner = unwrapped(model)
    tied = getattr(inner, "_tied_weights_keys", None)
    if isinstance(tied, Mapping) and isinstance(tied.get(head_name), str):
        names.append(tied[head_name])
    found = [name for name, _ in named_parameters(model) if name.endswith(_EMBEDDINGS)]
    prefix = head_name[: -len("lm_head.weight")]
    guessed = [f"{prefix}{body}{end}" for body in ("model.", "", "transformer.") for end in _EMBEDDINGS]
    return list(dict.fromkeys(names + found + guessed))


def declares_separate_head(model: nn.Module) -> bool:
    """Whether the model's config says explicitly that its head is not tied."""
    config = getattr(unwrapped(model), "config", None)
    return getattr(config, "tie_word_embeddings", None) is False


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside all wrappers around the whole of `model`."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
            continue
        inner = next((child for name, child in model.named_children() if name in _WRAPPERS), None)
        if inner is None:
            return model
        model = inner


def parts_of(model: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """The module, or the several, that were given as `model`.

    Raises:
        ValueError: it is something else.
    """
    parts = [model] if isinstance(model, nn.Module) or not isinstance(model, Sequence) else list(model)
    for part in parts:
        if not isinstance(part, nn.Module):
            raise ValueError(f"model is an object of type {type(part).__name__}; give an nn.Module, or a list of them")
    return parts


def part_prefixes(parts: Sequence[nn.Module]) -> list[str]:
    """What to put before the names of each of a model's parts: nothing, unless two parts use the same name.

    Stages of a pipeline keep the names of the whole model, so they share one name space, and may be cut
    differently when they are loaded. Parts that were built separately (`0.weight` twice) would overwrite each other.
    """
    if len(parts) == 1:
        return [""]
    owners: dict[str, torch.Tensor] = {}
    for part in parts:
        own = dict(named_parameters(part))
        if any(name in owners and owners[name] is not parameter for name, parameter in own.items()):
            return [f"part_{index}." for index in range(len(parts))]
        owners.update(own)
    return [""] * len(parts)
