"""Saving and loading after a forward without a backward, which leaves parameters of FSDP2 unsharded."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ray_stateful import checkpoint
from ray_stateful.stateful_wrappers import ModelState, OptimizerState
from ray_stateful.testing import run_ranks
from tests.ranks import peft_models
from tests.ranks.wrapper_models import Tied, assert_same, leaves, passed, train

LOW = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def evaluate(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        output = model(torch.arange(4).reshape(1, 4))
    unsharded = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
    assert unsharded, "nothing is unsharded after a forward: this proves nothing"
    return getattr(output, "logits", output)


def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = Tied(seed=seed)
    # What each of the three does after a forward is another thing: stay whole, go to fewer ranks, and what a root does.
    fully_shard(model.blocks[0], reshard_after_forward=False, mp_policy=LOW)
    fully_shard(model.blocks[1], reshard_after_forward=2, mp_policy=LOW)
    fully_shard(model, mp_policy=LOW)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    # The optimizer first, as a user's names may have it: no state dict of the model has resharded anything by then.
    return {"adam": OptimizerState(model, optimizer), "net": ModelState(model)}


def values(state: dict[str, Any]) -> dict[str, Any]:
    return leaves({name: part.state_dict() for name, part in state.items()})


def dense(run: str) -> None:
    logging.disable(logging.INFO)
    objects, fresh, direct = build(1), build(2), build(3)
    train(*objects, num_steps=1)
    expected = values(state_of(*objects))
    evaluate(objects[0])
    checkpoint.save(state_of(*objects), step=1, run=run)

    evaluate(fresh[0])
    checkpoint.restore(state_of(*fresh), run=run)
    saved = {name: part.state_dict() for name, part in state_of(*objects).items()}
    evaluate(direct[0])
    for name, part in state_of(*direct).items():
        part.load_state_dict(saved[name])

    assert_same(values(state_of(*objects)), expected)
    for loaded in (fresh, direct):
        # What was loaded is what is trained on, and no copy that the next forward or backward throws away.
        assert torch.equal(evaluate(loaded[0]), evaluate(objects[0]))
        assert_same(values(state_of(*loaded)), expected)
    for trained in (objects, fresh, direct):
        train(*trained, num_steps=1)
    assert_same(values(state_of(*fresh)), values(state_of(*objects)))
    assert_same(values(state_of(*direct)), values(state_of(*objects)))


def test_model_and_optimizer_are_saved_and_loaded_after_an_evaluation(tmp_path):
    passed(run_ranks(4, dense, str(tmp_path)))


def adapter() -> dict[str, Any]:
    logging.disable(logging.INFO)
    saved, fresh = (peft_models.build("score", seed) for seed in (1, 2))
    peft_models.nudge(saved)
    for model in (saved, fresh):
        fully_shard(model, mp_policy=LOW)
        evaluate(model)
    state = ModelState(saved, is_peft=True).state_dict()
    evaluate(saved)
    ModelState(fresh, is_peft=True).load_state_dict(state)
    assert torch.equal(evaluate(fresh), evaluate(saved))
    # After a backward, of which nothing comes, there are shards again.
    fresh(torch.arange(4).reshape(1, 4)).logits.sum().backward()
    fresh.zero_grad()
    assert_same(ModelState(fresh, is_peft=True).state_dict(), state)
    return state


# transformers' deprecation, met by peft; nothing of ours calls it.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_saved_in_full_precision_and_loaded_for_good_after_an_evaluation():
    expected = peft_models.build("score", 1)
    peft_models.nudge(expected)
    state, nothing = passed(run_ranks(2, adapter))
    assert_same(state, ModelState(expected, is_peft=True).state_dict())
    assert nothing == {}
