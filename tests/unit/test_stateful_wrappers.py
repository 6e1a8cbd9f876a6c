"""ModelState and the public helpers, without a process group."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful

from ray_stateful import checkpoint, stateful_wrappers
from ray_stateful.errors import SaveFailed
from ray_stateful.stateful_wrappers import ModelState, OptimizerState
from ray_stateful.states.part import StrictPart
from tests.part import opened
from tests.ranks.wrapper_models import Tied, assert_same, checkpoint_wrapper
from tests.transfer import snapshot, transfer

# Stock DCP says so whenever it saves or loads without a process group.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

_drop, _add = stateful_wrappers._drop_outer_prefix, stateful_wrappers._add_outer_prefix
head_and_name = stateful_wrappers._get_lm_head_weight_and_name


def test_the_prefix_is_upstreams():
    assert stateful_wrappers._PREFIX == "model."


# Name and default of each parameter of upstream's module, in its order: callers pass them by position too.
UPSTREAM = {
    "_drop_outer_prefix": [("sd",), ("prefix", "model.")],
    "_add_outer_prefix": [("sd",), ("prefix", "model."), ("skip_keys", [])],
    "_get_lm_head_weight_and_name": [("model",)],
    "ModelState": [("model",), ("is_peft", False), ("is_init_step", False), ("skip_task_head_prefixes", None)],
    "ModelState.state_dict": [("self",)],
    "ModelState.load_state_dict": [("self",), ("state_dict",)],
    "OptimizerState": [("model",), ("optimizer",), ("scheduler", None), ("is_peft", False)],
    "OptimizerState.state_dict": [("self",)],
    "OptimizerState.load_state_dict": [("self",), ("state_dict",)],
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_a_call_that_upstreams_signature_allows_means_the_same_here(name):
    owner, _, method = name.partition(".")
    found = getattr(stateful_wrappers, owner)
    parameters = inspect.signature(getattr(found, method) if method else found).parameters.values()
    ours = [(p.name,) if p.default is p.empty else (p.name, p.default) for p in parameters]

    assert ours[: len(UPSTREAM[name])] == UPSTREAM[name]
    # What is ours comes after, and can be left out.
    assert all(len(extra) == 2 for extra in ours[len(UPSTREAM[name]) :])
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def test_drop_strips_once_and_only_from_keys_that_start_with_the_prefix():
    sd = {"model.model.a": 1, "b": 2, "x.model.c": 3}
    assert _drop(sd) is None
    assert sd == {"model.a": 1, "b": 2, "x.model.c": 3}


def test_add_twice_is_add_once_and_leaves_skip_keys_alone():
    sd = {"a": 1, "lm_head.weight": 2}
    _add(sd, skip_keys=["lm_head.weight"])
    _add(sd, skip_keys=["lm_head.weight"])
    assert sd == {"model.a": 1, "lm_head.weight": 2}


@pytest.mark.parametrize("change", [_drop, _add])
def test_a_collision_names_both_keys_and_changes_nothing(change):
    sd = {"model.a": 1, "a": 2, "b": 3}
    with pytest.raises(ValueError, match=r"'model\.a' and 'a'|'a' and 'model\.a'"):
        change(sd)
    assert sd == {"model.a": 1, "a": 2, "b": 3}


def test_both_wrappers_are_stateful_and_strict_parts():
    model = Tied()
    for part in (ModelState(model), OptimizerState(model, torch.optim.SGD(model.parameters()))):
        assert isinstance(part, Stateful)
        assert isinstance(part, StrictPart)


class Nested(nn.Module):
    def __init__(self, inner: nn.Module, name: str) -> None:
        super().__init__()
        self.add_module(name, inner)


@pytest.mark.parametrize("path", ["", "model", "language_model"])
def test_the_head_is_found_wherever_it_is(path):
    model = Tied()
    weight = model.lm_head.weight
    root: nn.Module = Nested(model, path) if path else model
    assert head_and_name(root) == (weight, f"{path}.lm_head.weight" if path else "lm_head.weight")


def test_the_head_is_found_under_compile_and_activation_checkpointing():
    model = Tied(tied=False)
    weight = model.lm_head.weight
    model.lm_head = checkpoint_wrapper(model.lm_head)
    found, name = head_and_name(torch.compile(Nested(torch.compile(model, backend="eager"), "model"), backend="eager"))
    assert found is weight
    assert name == "model.lm_head.weight"


def test_no_head_is_none_twice_and_an_adapter_on_the_head_is_not_the_head():
    assert head_and_name(nn.Linear(2, 2)) == (None, None)
    layers = {"lora_A": nn.Linear(2, 2), "base_layer": nn.Linear(2, 2, bias=False)}
    model = Nested(nn.ModuleDict({"lora_A": layers["lora_A"]}), "lm_head")
    assert head_and_name(model) == (None, None)
    assert head_and_name(Nested(nn.ModuleDict(layers), "lm_head")) == (
        layers["base_layer"].weight,
        "lm_head.base_layer.weight",
    )


def test_users_own_submodules_named_like_wrappers_keep_their_names():
    model = Nested(nn.Linear(2, 2), "module")
    assert set(ModelState(model).state_dict()) == {"module.weight", "module.bias"}
    optimizer = OptimizerState(model, torch.optim.SGD(model.parameters())).state_dict()["optim"]
    assert {key for key in optimizer if key.endswith(".lr")} == {
        "param_groups.module.weight.lr",
        "param_groups.module.bias.lr",
    }


@pytest.mark.parametrize("says_tied", [True, False])
def test_only_a_head_that_really_shares_the_embedding_is_left_out_whatever_the_config_says(says_tied):
    for tied in (True, False):
        model = Tied(tied=tied)
        model.config = type("Config", (), {"tie_word_embeddings": says_tied})()
        assert ("lm_head.weight" in ModelState(model).state_dict()) is not tied


@pytest.mark.parametrize("says_tied", [True, False])
def test_a_head_trained_on_its_own_comes_back_as_it_was(says_tied):
    saved, fresh = Tied(tied=False, seed=1), Tied(tied=False, seed=2)
    fresh.config = type("Config", (), {"tie_word_embeddings": says_tied})()
    transfer(snapshot(ModelState(saved)), ModelState(fresh))
    assert torch.equal(fresh.lm_head.weight, saved.lm_head.weight)
    assert not torch.equal(fresh.lm_head.weight, fresh.embed_tokens.weight)


def test_a_head_over_the_same_storage_is_tied_although_it_is_another_parameter():
    model = Tied(tied=False)
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.data)
    assert "lm_head.weight" not in ModelState(model).state_dict()
    # Of which it may have only a part, and be another tensor.
    model.lm_head.weight = nn.Parameter(model.embed_tokens.weight.data[:5])
    assert "lm_head.weight" in ModelState(model).state_dict()


def test_a_tied_model_without_a_head_loads():
    saved, fresh = (nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2)) for _ in range(2))
    fresh.config = type("Config", (), {"tie_word_embeddings": True})()
    assert transfer(snapshot(ModelState(saved)), ModelState(fresh)).problems == ()
    assert_same(snapshot(ModelState(fresh)), snapshot(ModelState(saved)))


def test_a_checkpoint_without_a_head_fills_a_head_from_the_embedding_and_says_so():
    saved, fresh = Tied(seed=1), Tied(tied=False, seed=2)
    judged = transfer(snapshot(ModelState(saved)), ModelState(fresh))
    assert judged.problems == ()
    assert judged.notes == ("lm_head.weight is taken from embed_tokens.weight",)
    assert torch.equal(fresh.lm_head.weight, saved.embed_tokens.weight)
    assert fresh.lm_head.weight is not fresh.embed_tokens.weight


def test_a_checkpoint_without_a_head_is_a_problem_where_the_config_says_the_head_is_separate():
    fresh = Tied(tied=False, seed=2)
    fresh.config = type("Config", (), {"tie_word_embeddings": False})()
    judged = transfer(snapshot(ModelState(Tied(seed=1))), ModelState(fresh))
    assert judged.problems == ("lm_head.weight is not in the checkpoint",)


def test_a_head_in_the_checkpoint_does_not_overwrite_the_embedding_it_is_tied_to_here():
    saved, fresh = Tied(tied=False, seed=1), Tied(seed=2)
    judged = transfer(snapshot(ModelState(saved)), ModelState(fresh))
    assert "lm_head.weight" in judged.notes[0]
    assert ModelState(fresh).reconcile(frozenset(), frozenset({"_orig_mod.lm_head.weight"})).problems == ()
    assert torch.equal(fresh.lm_head.weight, saved.embed_tokens.weight)
    direct = Tied(seed=3)
    ModelState(direct).load_state_dict(ModelState(saved).state_dict())
    assert torch.equal(direct.embed_tokens.weight, saved.embed_tokens.weight)


class LastStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)


def test_a_last_stage_without_embedding_takes_its_head_from_the_embedding_of_the_checkpoint():
    saved, stage = Tied(seed=1), LastStage()
    state = {"embed_tokens.weight": saved.embed_tokens.weight.detach(), **nn.LayerNorm(8).state_dict(prefix="norm.")}
    part = ModelState(stage)
    part.load_state_dict(state)
    assert torch.equal(stage.lm_head.weight, saved.embed_tokens.weight)
    assert "lm_head.weight is taken from embed_tokens.weight" in part.describe()


def test_missing_and_unexpected_keys_are_refused_before_anything_is_loaded():
    model, other = Tied(seed=1), Tied(seed=2)
    before = copy.deepcopy(model.state_dict())
    state = ModelState(other).state_dict()
    del state["scale"]
    state["blocks.9.norm.weight"] = torch.ones(8)
    with pytest.raises(ValueError, match=r"(?s)scale is not in .*blocks\.9\.norm\.weight is in"):
        ModelState(model).load_state_dict(state)
    assert_same(dict(model.state_dict()), dict(before))


def test_without_strict_what_was_not_loaded_is_counted_and_said():
    model, other = Tied(seed=1), Tied(seed=2)
    state = ModelState(other).state_dict()
    del state["scale"]
    part = ModelState(model, strict=False)
    part.load_state_dict(state)
    assert part.describe().startswith(f"{len(state)} tensors; ")
    assert "scale is not in the checkpoint: kept as built" in part.describe()
    assert torch.equal(model.embed_tokens.weight, other.embed_tokens.weight)


def test_another_shape_is_refused_before_anything_is_loaded():
    model = Tied(seed=1)
    before = copy.deepcopy(model.state_dict())
    state = {**ModelState(Tied(seed=2)).state_dict(), "scale": torch.ones(3)}
    with pytest.raises(ValueError, match=r"scale: \(3,\) given, \(1,\) in the model"):
        ModelState(model).load_state_dict(state)
    assert_same(dict(model.state_dict()), dict(before))


def test_loading_leaves_the_given_dict_as_it_was():
    state = ModelState(Tied(seed=1)).state_dict()
    keys = list(state)
    ModelState(torch.compile(Tied(seed=2), backend="eager")).load_state_dict(state)
    assert list(state) == keys


class Transformer8Bit(nn.Linear):
    """Keeps its scales as Transformer Engine does: pickled, in a tensor of bytes."""

    def __init__(self, extra: bytes) -> None:
        super().__init__(2, 2)
        self.extra: Any = torch.frombuffer(bytearray(extra), dtype=torch.uint8)

    def get_extra_state(self) -> torch.Tensor:
        return self.extra

    def set_extra_state(self, state: torch.Tensor) -> None:
        if not isinstance(state, torch.Tensor):
            raise RuntimeError(f"unsupported checkpoint format: {type(state)}")
        self.extra = state


def test_extra_state_of_another_size_loads(tmp_path):
    saved, fresh = nn.Sequential(Transformer8Bit(b"longer than")), nn.Sequential(Transformer8Bit(b"this"))
    dcp.save({"model": ModelState(saved)}, checkpoint_id=tmp_path, no_dist=True)
    dcp.load({"model": ModelState(fresh)}, checkpoint_id=tmp_path, no_dist=True)
    assert torch.equal(fresh[0].extra, saved[0].extra)
    assert torch.equal(fresh[0].weight, saved[0].weight)


def test_absent_or_unexpected_extra_state_is_a_note():
    with_extra, without = nn.Sequential(Transformer8Bit(b"abc")), nn.Sequential(nn.Linear(2, 2))
    judged = transfer(snapshot(ModelState(without)), ModelState(with_extra))
    assert judged.problems == ()
    assert "0._extra_state" in judged.notes[0]
    assert bytes(with_extra[0].extra.tolist()) == b"abc"
    assert transfer(snapshot(ModelState(with_extra)), ModelState(without)).problems == ()


class Odd(nn.Module):
    """A scalar, a parameter that is not contiguous, and dtypes without arithmetic."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.scalar = nn.Parameter(torch.rand((), generator=generator))
        self.turned = nn.Parameter(torch.rand(3, 5, generator=generator).t())
        self.register_buffer("mask", torch.rand(7, generator=generator) > 0.5)
        self.register_buffer("codes", torch.randint(-128, 127, (6,), generator=generator).to(torch.int8))
        self.register_buffer("eight", torch.rand(6, generator=generator).to(torch.float8_e4m3fn))
        self.sixteen = nn.Parameter(torch.rand(3, generator=generator).bfloat16())


def test_scalars_and_odd_dtypes_and_strides_come_back(tmp_path):
    saved, fresh = Odd(1), Odd(2)
    dcp.save({"model": ModelState(saved)}, checkpoint_id=tmp_path, no_dist=True)
    dcp.load({"model": ModelState(fresh)}, checkpoint_id=tmp_path, no_dist=True)
    for name, value in saved.state_dict().items():
        found = fresh.state_dict()[name]
        assert found.dtype == value.dtype
        assert torch.equal(found.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8)), name
    assert fresh.turned.stride() == saved.turned.stride()


def test_the_dense_state_aliases_the_live_parameters_and_offloaded_state_does_not():
    model = Tied()
    assert ModelState(model).state_dict()["scale"].data_ptr() == model.scale.data_ptr()
    state = ModelState(model, cpu_offload=True).state_dict()
    fresh = Tied(seed=5)
    ModelState(fresh, cpu_offload=True).load_state_dict(state)
    assert torch.equal(fresh.scale, model.scale)


def test_parts_with_names_of_their_own_share_a_name_space_and_parts_without_get_one_each():
    first, last = nn.ModuleDict({"0": nn.Linear(2, 2)}), nn.ModuleDict({"1": nn.Linear(2, 2)})
    assert set(ModelState([first, last]).state_dict()) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    saved, fresh = [nn.Linear(2, 2), nn.Linear(2, 2)], [nn.Linear(2, 2), nn.Linear(2, 2)]
    state = ModelState(saved).state_dict()
    assert set(state) == {"part_0.weight", "part_0.bias", "part_1.weight", "part_1.bias"}
    ModelState(fresh).load_state_dict(state)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(saved, fresh, strict=True))


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda model, optimizer: ModelState(optimizer), "model is an object of type SGD"),
        (lambda model, optimizer: ModelState(model.state_dict()), "model is an object of type OrderedDict"),
        (lambda model, optimizer: ModelState([model, "x"]), "model is an object of type str"),
        (lambda model, optimizer: OptimizerState(optimizer, model), "model is an object of type SGD"),
        (lambda model, optimizer: OptimizerState(model, optimizer, optimizer), "scheduler is an optimizer"),
    ],
    ids=["optimizer", "state dict", "one of two", "swapped", "scheduler"],
)
def test_what_is_no_model_or_no_scheduler_is_refused_when_it_is_wrapped(build, said):
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=said):
        build(model, torch.optim.SGD(model.parameters()))


def two_stages(*numbers):
    stages = [nn.ModuleDict({name: nn.Linear(2, 2)}) for name in ("first", "second")]
    for stage, number in zip(stages, numbers, strict=True):
        stage.register_buffer("frequencies", torch.full((2,), number))
    return stages


def test_a_buffer_that_parts_share_by_name_is_one_entry_and_refused_if_they_disagree_when_saved(tmp_path):
    part, fresh = ModelState(two_stages(3.0, 3.0)), two_stages(0.0, 1.0)
    assert [key for key in part.state_dict() if "frequencies" in key] == ["frequencies"]
    checkpoint.save({"m": part}, step=1, run=str(tmp_path))
    # Loaded into parts that disagree, as memory of `to_empty` does: both have the same afterwards.
    report = checkpoint.restore({"m": ModelState(fresh)}, run=str(tmp_path))
    assert all(torch.equal(stage.frequencies, torch.full((2,), 3.0)) for stage in fresh)
    assert [part.outcome for part in report.parts] == ["exact"]

    # One of them would be lost.
    with pytest.raises(SaveFailed, match="frequencies: an entry that two parts of the model have"):
        checkpoint.save({"m": ModelState(two_stages(3.0, 4.0))}, step=2, run=str(tmp_path))


def test_a_checkpoint_is_fallen_back_to_though_a_damaged_one_has_filled_a_buffer_of_one_part_alone(tmp_path):
    for step in (1, 2):
        saved = checkpoint.save({"m": ModelState(two_stages(float(step), float(step)))}, step=step, run=str(tmp_path))
    (row,) = opened(saved).chunks["m.second.weight"]
    file = Path(saved.uri, row.file)
    content = bytearray(file.read_bytes())
    content[row.data_offset] ^= 1
    file.write_bytes(content)
    fresh = two_stages(0.0, 0.0)
    report = checkpoint.restore({"m": ModelState(fresh)}, run=str(tmp_path))
    assert (report.step, len(report.rejected)) == (1, 1)
    assert all(torch.equal(stage.frequencies, torch.full((2,), 1.0)) for stage in fresh)


class Measured(nn.Module):
    """Without parameters, and with extra state that can't be compared by ==."""

    def get_extra_state(self):
        return {"scales": torch.ones(2)}

    def set_extra_state(self, state):
        pass


def test_extra_state_that_parts_share_by_name_is_no_reason_to_refuse_them(tmp_path):
    stages = two_stages(3.0, 3.0)
    for stage in stages:
        stage["attention"] = Measured()
    checkpoint.save({"m": ModelState(stages)}, step=1, run=str(tmp_path))
    checkpoint.restore({"m": ModelState(stages)}, run=str(tmp_path))


def test_loading_a_base_model_skips_task_heads_and_adapters():
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "classifier": nn.Linear(2, 3)})
    model["body"].lora_A = nn.Linear(2, 1)
    part = ModelState(model, is_init_step=True, skip_task_head_prefixes=["classifier."])
    assert set(part.state_dict()) == {"body.weight", "body.bias"}
    part.load_state_dict({"body.weight": torch.ones(2, 2), "pooler.weight": torch.ones(1)})
    assert torch.equal(model["body"].weight, torch.ones(2, 2))
    assert "body.bias is not in the checkpoint" in part.describe()
    assert "pooler.weight is in the checkpoint, but not in the model" in part.describe()
