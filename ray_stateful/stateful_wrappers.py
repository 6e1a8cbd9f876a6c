"""Model and optimizer as `Stateful`s: what a checkpoint holds of them, under which keys, and how it comes back.

The public names and signatures are those of NeMo Automodel's module of this name. Both classes work with plain
`torch.distributed.checkpoint`, and with `ray_stateful.restore`, which asks `reconcile` about keys that only the state
or only the checkpoint has, before it touches anything.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ray_stateful.wrappers import model_keys
from ray_stateful.wrappers.model_state import ModelState
from ray_stateful.wrappers.optimizer_state import OptimizerState

__all__ = ["ModelState", "OptimizerState"]

_PREFIX = model_keys.PREFIX


def _drop_outer_prefix(sd: dict[str, Any], prefix: str = _PREFIX) -> None:
    """Strip `prefix` once, in place, from the keys of `sd` that start with it.

    Raises:
        ValueError: two keys would become one; names both, and leaves `sd` as it was.
    """
    model_keys.drop_prefix(sd, prefix)


def _add_outer_prefix(
    sd: dict[str, Any],
    prefix: str = _PREFIX,
    skip_keys: list[str] = [],  # noqa: B006 - upstream's signature; only read
) -> None:
    """Put `prefix`, in place, before the keys of `sd` that lack it and are not in `skip_keys`.

    Raises:
        ValueError: two keys would become one; names both, and leaves `sd` as it was.
    """
    model_keys.add_prefix(sd, prefix, skip_keys)


def _get_lm_head_weight_and_name(model: nn.Module) -> tuple[nn.Parameter, str] | tuple[None, None]:
    """The output head's parameter and its canonical name, tied or not; `(None, None)` without a head.

    FSDP1 with `use_orig_params=False` leaves only flat parameters: no head can be found there.
    """
    return model_keys.head_and_name(model)
