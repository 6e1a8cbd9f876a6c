"""Adapters of the real `peft` on a tiny transformers model, without a process group; and real tied models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from ray_stateful.stateful_wrappers import ModelState, OptimizerState
from tests.ranks.peft_models import KINDS, build, nudge
from tests.ranks.wrapper_models import assert_same
from tests.transfer import flatten, snapshot, transfer

pytestmark = [
    # transformers' deprecation, met by peft; nothing of ours calls it.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Stock DCP says so whenever it saves or loads without a process group.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_saved_under_the_keys_that_peft_itself_writes_and_loads(kind, tmp_path):
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved, fresh, theirs = build(kind, 1), build(kind, 2), build(kind, 3)
    nudge(saved)
    state = ModelState(saved, is_peft=True).state_dict()
    assert_same(state, get_peft_model_state_dict(saved, save_embedding_layers=False))
    assert all(key.startswith("base_model.model.") for key in state)
    assert not any(value.requires_grad for value in state.values())

    dcp.save({"model": ModelState(saved, is_peft=True)}, checkpoint_id=tmp_path)
    dcp.load({"model": ModelState(fresh, is_peft=True)}, checkpoint_id=tmp_path)
    assert_same(trained(fresh), trained(saved))

    result = set_peft_model_state_dict(theirs, state)
    assert not result.unexpected_keys
    assert_same(trained(theirs), trained(saved))


def test_the_state_is_a_copy_and_holds_no_buffers():
    model = build("score", 1)
    model.get_base_model().score.register_buffer("running", torch.ones(1))
    state = ModelState(model, is_peft=True).state_dict()
    assert not any("running" in key for key in state)
    before = {key: value.clone() for key, value in state.items()}
    nudge(model)
    assert_same(state, before)


@pytest.mark.parametrize(
    "spelling", ["lora_magnitude_vector.default.weight", "lora_magnitude_vector.weight", "lora_magnitude"]
)
@pytest.mark.parametrize("way", ["direct", "restore"])
def test_older_spellings_of_the_magnitude_still_load(spelling, way):
    saved, fresh = build("dora", 1), build("dora", 2)
    nudge(saved)
    state = ModelState(saved, is_peft=True).state_dict()
    assert any(key.endswith(".lora_magnitude_vector") for key in state)
    state = {key.replace("lora_magnitude_vector", spelling): value for key, value in state.items()}
    part = ModelState(fresh, is_peft=True)
    if way == "direct":
        part.load_state_dict(state)
    else:
        assert transfer(state, part).problems == ()
    assert_same(trained(fresh), trained(saved))


def test_keys_without_the_outer_prefix_still_load():
    saved, fresh = build("lora", 1), build("lora", 2)
    nudge(saved)
    state = ModelState(saved, is_peft=True).state_dict()
    ModelState(fresh, is_peft=True).load_state_dict({k.removeprefix("base_model.model."): v for k, v in state.items()})
    assert_same(trained(fresh), trained(saved))


class HomemadeDora(nn.Module):
    """An adapter without peft: no adapter names, no outer prefix, and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.q_proj.requires_grad_(False)
        self.q_proj.lora_A = nn.Linear(4, 2, bias=False)
        self.q_proj.lora_magnitude = nn.Parameter(torch.rand(4))
        self.score = nn.Linear(4, 2)


def test_an_adapter_without_peft_gets_the_same_keys():
    saved, fresh = HomemadeDora(), HomemadeDora()
    state = ModelState(saved, is_peft=True).state_dict()
    assert set(state) == {
        "base_model.model.q_proj.lora_A.weight",
        "base_model.model.q_proj.lora_magnitude_vector",
        "base_model.model.score.weight",
        "base_model.model.score.bias",
    }
    ModelState(fresh, is_peft=True).load_state_dict(state)
    assert_same(trained(fresh), trained(saved))


def test_two_adapters_that_are_trained_together_keep_their_names():
    model = nn.Module()
    model.peft_config = {"one": None, "other": None}
    model.lora_A = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in model.peft_config})

    state = ModelState(model, is_peft=True).state_dict()

    assert state.keys() == {f"base_model.model.lora_A.{name}.weight" for name in model.peft_config}


def test_a_missing_adapter_tensor_is_refused_and_nothing_is_loaded():
    saved, fresh = build("lora", 1), build("lora", 2)
    nudge(saved)
    before = trained(fresh)
    state = ModelState(saved, is_peft=True).state_dict()
    state["base_model.model.stranger"] = state.pop(min(state))
    with pytest.raises(ValueError, match=r"(?s)2 entries.*lora_A\.weight is not in .*stranger is in"):
        ModelState(fresh, is_peft=True).load_state_dict(state)
    assert_same(trained(fresh), before)
    part = ModelState(fresh, is_peft=True, strict=False)
    part.load_state_dict(state)
    assert part.describe().startswith(f"{len(state) - 1} tensors; adapter; ")


class Adapted(nn.Module):
    """A frozen layer with an adapter of the given rank, as people write them without peft."""

    def __init__(self, rank: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.base = nn.Linear(6, 5).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(6, rank, bias=False), nn.Linear(rank, 5, bias=False)


def test_an_adapter_of_another_rank_is_refused_and_nothing_is_loaded():
    saved, fresh = Adapted(1, seed=1), Adapted(8, seed=2)
    before = trained(fresh)
    state = ModelState(saved, is_peft=True).state_dict()
    # A single row would be repeated in all eight.
    listed = r"lora_A\.weight: \(1, 6\) given, \(8, 6\) in the model.*lora_B\.weight: \(5, 1\) given, \(5, 8\) in"
    with pytest.raises(ValueError, match=rf"(?s)nothing was loaded:.*{listed}"):
        ModelState(fresh, is_peft=True).load_state_dict(state)
    assert_same(trained(fresh), before)


def test_the_base_model_loads_without_adapters():
    model = build("lora", 1)
    part = ModelState(model, is_peft=True, is_init_step=True)
    state = part.state_dict()
    assert state
    assert not any("lora_" in key for key in state)
    part.load_state_dict({key: torch.zeros_like(value) for key, value in state.items()})
    assert not any(value.any() for value in part.state_dict().values())


def test_the_optimizer_of_an_adapter_comes_back():
    saved, fresh = build("lora", 1), build("lora", 2)
    optimizer, again = (torch.optim.AdamW(model.parameters()) for model in (saved, fresh))
    saved(torch.arange(4)[None]).logits.sum().backward()
    optimizer.step()
    assert transfer(snapshot(OptimizerState(saved, optimizer)), OptimizerState(fresh, again)).notes == ()
    assert_same(
        snapshot(OptimizerState(fresh, again, is_peft=True)), snapshot(OptimizerState(saved, optimizer, is_peft=True))
    )
    assert len(again.state) == len(trained(fresh))


def tiny(seed: int, **config: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, **config))


@pytest.mark.parametrize("tied", [True, False])
def test_a_real_transformers_model_comes_back_tied_or_not(tied, tmp_path):
    saved, fresh = tiny(1, tie_word_embeddings=tied), tiny(2, tie_word_embeddings=tied)
    assert ("lm_head.weight" in ModelState(saved).state_dict()) is not tied
    dcp.save({"model": ModelState(saved)}, checkpoint_id=tmp_path)
    dcp.load({"model": ModelState(fresh)}, checkpoint_id=tmp_path)
    assert_same(dict(fresh.state_dict()), dict(saved.state_dict()))
    assert (fresh.lm_head.weight is fresh.transformer.wte.weight) is tied


def test_a_tied_real_checkpoint_fills_an_untied_real_model():
    saved, fresh = tiny(1), tiny(2, tie_word_embeddings=False)
    fresh.config.tie_word_embeddings = True
    transfer(flatten(ModelState(saved).state_dict()), ModelState(fresh))
    assert torch.equal(fresh.lm_head.weight, saved.transformer.wte.weight)
