"""ModelState and OptimizerState on several ranks: every wrapping, uneven and empty shards, pipelines, adapters."""

from __future__ import annotations

import copy
import functools
import gc
import logging
import os
import subprocess
import sys
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from ray_stateful import checkpoint
from ray_stateful.errors import UnsupportedState
from ray_stateful.stateful_wrappers import ModelState, OptimizerState, _get_lm_head_weight_and_name
from ray_stateful.testing import run_ranks
from ray_stateful.wrappers import fsdp1_optimizer
from tests.ranks import peft_models
from tests.ranks.wrapper_models import WRAPPINGS, Tied, assert_same, fsdp2, group_of_a_device, leaves, passed, train
from tests.transfer import snapshot


def parts(
    wrapping: str, seed: int, make: Any = torch.optim.AdamW, **options: Any
) -> tuple[Any, Any, Any, dict[str, Any]]:
    model = WRAPPINGS[wrapping](Tied(seed=seed, **options))
    optimizer = make(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer, scheduler)}
    return model, optimizer, scheduler, state


def values(state: dict[str, Any]) -> dict[str, Any]:
    return leaves({name: part.state_dict() for name, part in state.items()})


def save_and_load_under(directory: str, saved_under: str) -> None:
    # FSDP1 and its ShardedTensor announce their end at every step; people have them all the same.
    warnings.simplefilter("ignore")
    model, optimizer, scheduler, state = parts(saved_under, 1)
    train(model, optimizer, scheduler, num_steps=2)
    expected = values(state)
    assert "model.lm_head.weight" not in expected
    assert len(expected) > 100
    dcp.save(state, checkpoint_id=directory)
    for loaded_under in WRAPPINGS:
        *_, fresh = parts(loaded_under, 2)
        dcp.load(fresh, checkpoint_id=directory)
        assert_same(values(fresh), expected)
        assert fresh["optimizer"].describe() == "AdamW, 1 group; scheduler LambdaLR at step 2"


@pytest.mark.parametrize("saved_under", WRAPPINGS)
def test_what_was_saved_under_one_wrapping_loads_under_every_other(saved_under, tmp_path):
    passed(run_ranks(2, save_and_load_under, str(tmp_path), saved_under))


def go_on(directory: str, wrapping: str) -> None:
    warnings.simplefilter("ignore")
    model, optimizer, scheduler, state = parts(wrapping, 1)
    train(model, optimizer, scheduler, num_steps=2)
    dcp.save(state, checkpoint_id=directory)
    fresh, again, scheduler_again, fresh_state = parts(wrapping, 2)
    dcp.load(fresh_state, checkpoint_id=directory)
    train(model, optimizer, scheduler, num_steps=2)
    train(fresh, again, scheduler_again, num_steps=2)
    assert_same(values(fresh_state), values(state))


@pytest.mark.parametrize("wrapping", ["ddp", "fsdp1", "fsdp1_flat", "fsdp2"])
def test_training_goes_on_bit_for_bit(wrapping, tmp_path):
    passed(run_ranks(2, go_on, str(tmp_path), wrapping))


def save_resized(directory: str) -> dict[str, Any]:
    model, optimizer, scheduler, state = parts("fsdp2", 1)
    train(model, optimizer, scheduler, num_steps=2)
    assert all(isinstance(v, DTensor) for k, v in state["model"].state_dict().items() if not k.endswith("seen"))
    dcp.save(state, checkpoint_id=directory)
    return values(state)


def load_resized(directory: str, expected: dict[str, Any]) -> None:
    *_, state = parts("fsdp2", 2)
    dcp.load(state, checkpoint_id=directory)
    assert_same(values(state), expected)


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(4, 3), (1, 4)])
def test_uneven_and_empty_shards_come_back_on_another_number_of_ranks(saved_by, loaded_by, tmp_path):
    expected = passed(run_ranks(saved_by, save_resized, str(tmp_path)))[0]
    passed(run_ranks(loaded_by, load_resized, str(tmp_path), expected))


class TwoRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(2, 4)
        self.lm_head = nn.Linear(4, 2, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.embed_tokens(tokens))


def keys_with_empty_shards() -> list[str]:
    model = fsdp2(TwoRows())
    return sorted(ModelState(model).state_dict())


def test_ranks_with_empty_shards_do_not_take_the_head_for_tied():
    assert run_ranks(3, keys_with_empty_shards) == [["embed_tokens.weight", "lm_head.weight"]] * 3


def heads() -> dict[str, list[str | None]]:
    warnings.simplefilter("ignore")
    found: dict[str, list[str | None]] = {}
    for wrapping, wrap in WRAPPINGS.items():
        for tied in (True, False):
            model = wrap(Tied(tied=tied))
            head, name = _get_lm_head_weight_and_name(model)
            assert head is None or any(head is parameter for parameter in model.parameters())
            found.setdefault(wrapping, []).append(name)
    return found


def test_the_head_is_found_under_every_wrapping_that_leaves_it_a_parameter_tied_or_not():
    expected: dict[str, list[str | None]] = dict.fromkeys(WRAPPINGS, ["lm_head.weight"] * 2)
    assert passed(run_ranks(2, heads)) == [{**expected, "fsdp1_flat": [None, None]}] * 2


def stock_states() -> None:
    model, optimizer, scheduler, state = parts("fsdp2", 1)
    train(model, optimizer, scheduler, num_steps=1)
    ours, theirs = state["model"].state_dict(), get_model_state_dict(model)
    theirs.pop("lm_head.weight")
    assert_same(leaves(ours), leaves(theirs))
    flat = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True))
    assert_same(leaves(state["optimizer"].state_dict()["optim"]), leaves(flat))
    assert ours["scale"].to_local().data_ptr() == model.scale.to_local().data_ptr()
    *_, fresh_state = parts("fsdp2", 2)
    whole = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    fresh_state["optimizer"].load_state_dict({"optim": whole, "sched": scheduler.state_dict()})
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    fresh_state["model"].load_state_dict(full)
    assert_same(values(fresh_state), values(state))


def test_the_dense_state_is_stocks_sharded_one_and_whole_tensors_load_too():
    passed(run_ranks(2, stock_states))


def two_optimizers(directory: str, wrapping: str) -> str:
    warnings.simplefilter("ignore")
    states = []
    for seed in (1, 2):
        model = WRAPPINGS[wrapping](Tied(seed=seed))
        blocks = [p for name, p in model.named_parameters() if "blocks" in name]
        rest = [p for name, p in model.named_parameters() if "blocks" not in name]
        optimizers = [torch.optim.AdamW(blocks), torch.optim.SGD(rest, lr=0.1, momentum=0.9)]
        try:
            states.append({"optimizer": OptimizerState(model, optimizers)})
        except ValueError as error:
            return str(error)
        if seed == 1:
            for optimizer in optimizers:
                train(model, optimizer, num_steps=1)
    saved, fresh = states
    dcp.save(saved, checkpoint_id=directory)
    dcp.load(fresh, checkpoint_id=directory)
    assert_same(values(fresh), values(saved))
    return "came back"


@pytest.mark.parametrize(
    ("wrapping", "outcome"),
    [("fsdp2", "came back"), ("fsdp1", "2 optimizers for 1 FSDP1 modules: give each module one optimizer")],
)
def test_two_optimizers_of_one_sharded_model_come_back_or_are_refused_at_once(wrapping, outcome, tmp_path):
    for found in passed(run_ranks(2, two_optimizers, str(tmp_path), wrapping)):
        assert found.startswith(outcome)


class Siamese(Tied):
    """Has a module under two names, and one inside it."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.query = nn.Sequential(self.blocks[0])
        self.key = self.query


def shared_modules(directory: str) -> None:
    warnings.simplefilter("ignore")
    # torch shards no module both with and without a wrapper of activation checkpointing around it.
    for wrapping in sorted(WRAPPINGS.keys() - {"checkpointed"}):
        states = []
        for seed in (1, 2):
            model = WRAPPINGS[wrapping](Siamese(seed))
            optimizer = torch.optim.AdamW(model.parameters())
            states.append({"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)})
            if seed == 1:
                train(model, optimizer, num_steps=1)
        saved, fresh = states
        checkpoint.save(saved, step=1, run=f"{directory}/{wrapping}")
        checkpoint.restore(fresh, run=f"{directory}/{wrapping}")
        assert "key.0.up.weight" in saved["model"].state_dict()
        assert_same(values(fresh), values(saved))


def test_a_module_under_several_names_comes_back_under_every_wrapping(tmp_path):
    passed(run_ranks(2, shared_modules, str(tmp_path)))


class Expert(Tied):
    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.expert = nn.Linear(8, 8)


def unused_expert(directory: str, wrapping: str) -> None:
    warnings.simplefilter("ignore")
    results = []
    for seed in (1, 2):
        model = WRAPPINGS[wrapping](Expert(seed))
        optimizer = torch.optim.AdamW(model.parameters())
        results.append((model, optimizer, OptimizerState(model, optimizer)))
    (model, optimizer, saved), (fresh, again, loaded) = results
    train(model, optimizer, num_steps=2)
    fresh(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    gradients = [parameter.grad for parameter in fresh.parameters()]
    assert any(gradient is not None for gradient in gradients)
    dcp.save({"o": saved}, checkpoint_id=directory)
    dcp.load({"o": loaded}, checkpoint_id=directory, planner=DefaultLoadPlanner(allow_partial_load=wrapping == "fsdp1"))
    assert all(parameter.grad is g for parameter, g in zip(fresh.parameters(), gradients, strict=True))
    fresh.zero_grad()
    assert len(again.state) == len(optimizer.state)
    assert_same(leaves(loaded.state_dict()), leaves(saved.state_dict()))


@pytest.mark.parametrize("wrapping", ["fsdp1", "fsdp2"])
def test_an_unused_expert_and_live_gradients_cost_no_moments_on_ranks(wrapping, tmp_path):
    passed(run_ranks(2, unused_expert, str(tmp_path), wrapping))


def with_momentum(directory: str, num_steps: int) -> tuple[list[str], list[str]]:
    """The parameters that have a momentum on this rank, where it was saved and where it was loaded."""
    found = []
    for seed in (1, 2):
        model = fsdp2(Tied(seed=seed))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, dampening=0.5)
        state = {"optimizer": OptimizerState(model, optimizer)}
        if seed == 1:
            train(model, optimizer, num_steps=num_steps)
            checkpoint.save(state, step=num_steps, run=directory)
        else:
            checkpoint.restore(state, run=directory)
        found.append([name for name, parameter in model.named_parameters() if optimizer.state.get(parameter)])
    return found[0], found[1]


@pytest.mark.parametrize(("num_steps", "has_momentum"), [(0, False), (2, True)])
def test_dampened_momentum_comes_back_on_the_ranks_with_an_empty_shard_as_on_all_others(
    num_steps, has_momentum, tmp_path
):
    everyone = passed(run_ranks(4, with_momentum, str(tmp_path), num_steps))
    assert bool(everyone[0][0]) == has_momentum
    assert everyone == [(everyone[0][0], everyone[0][0])] * 4


def joined_by_a_new_parameter(wrapping: str) -> list[float]:
    warnings.simplefilter("ignore")
    *_, state = parts(wrapping, 1)
    saved = {key: value for key, value in state["optimizer"].state_dict()["optim"].items() if ".scale." not in key}
    model = WRAPPINGS[wrapping](Tied(seed=2))
    by_name = dict(model.named_parameters())
    scale = by_name.pop(next(name for name in by_name if name.endswith("scale")))
    optimizer = torch.optim.AdamW([scale, *by_name.values()], lr=9.0)
    OptimizerState(model, optimizer).load_state_dict({"optim": saved})
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("wrapping", ["fsdp1", "fsdp2"])
def test_a_new_parameter_that_comes_first_in_its_group_does_not_cost_it_its_learning_rate(wrapping):
    assert run_ranks(2, joined_by_a_new_parameter, wrapping) == [[0.1]] * 2


def misfits(wrapping: str) -> None:
    warnings.simplefilter("ignore")
    model, optimizer, _, state = parts(wrapping, 1)
    train(model, optimizer, num_steps=1)
    saved = state["optimizer"].state_dict()["optim"]
    key = next(key for key in saved if key.endswith("up.weight.exp_avg"))
    kept = {name: value for name, value in saved.items() if name != key}
    for given, found in (({key: torch.ones(1)}, r"has shape \(1,\), and \(3, 8\) here"), ({}, r"lacks \['exp_avg'\]")):
        fresh = WRAPPINGS[wrapping](Tied(seed=2))
        again = torch.optim.AdamW(fresh.parameters(), lr=9.0)
        with pytest.raises(ValueError, match=found):
            OptimizerState(fresh, again).load_state_dict({"optim": {**kept, **given}})
        assert not again.state
        assert again.param_groups[0]["lr"] == 9.0


@pytest.mark.parametrize("wrapping", ["fsdp1", "fsdp1_flat", "fsdp2"])
def test_state_that_a_sharded_optimizer_can_not_have_is_refused_on_every_rank_before_any_is_loaded(wrapping):
    passed(run_ranks(2, misfits, wrapping))


def regrouped(directory: str) -> None:
    warnings.simplefilter("ignore")
    for wrapping in ("fsdp1", "fsdp1_flat", "fsdp2"):
        rates, optimizers, schedulers, states = ([0.1, 0.2], [0.2, 0.1]), [], [], []
        for order in rates:
            layers = {rate: WRAPPINGS[wrapping](nn.Linear(4, 4)) for rate in (0.1, 0.2)}
            model = WRAPPINGS[wrapping](nn.Sequential(*layers.values()))
            optimizer = torch.optim.AdamW([{"params": [*layers[rate].parameters()], "lr": rate} for rate in order])
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
            states.append({"optimizer": OptimizerState(model, optimizer, scheduler)})
            optimizers.append(optimizer)
            schedulers.append(scheduler)
        checkpoint.save(states[0], step=0, run=f"{directory}/{wrapping}")
        checkpoint.restore(states[1], run=f"{directory}/{wrapping}")
        for order, optimizer, scheduler in zip(rates, optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            assert [group["lr"] for group in optimizer.param_groups] == [rate / 2 for rate in order]


def test_each_group_of_a_sharded_model_keeps_its_own_schedule_in_another_order(tmp_path):
    passed(run_ranks(2, regrouped, str(tmp_path)))


def before_the_first_step(directory: str, wrapping: str) -> None:
    warnings.simplefilter("ignore")
    for name, make in {
        "AdamW": torch.optim.AdamW,
        "NAdam": torch.optim.NAdam,
        "SGD": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    }.items():
        made = []
        for _ in range(3):
            model = WRAPPINGS[wrapping](Tied(seed=1))
            optimizer = make(model.parameters())
            made.append((model, optimizer, {"m": ModelState(model), "o": OptimizerState(model, optimizer)}))
        (model, optimizer, saved), (fresh, again, loaded), (untouched, other, never_saved) = made
        ran: list[Any] = []
        optimizer.register_step_post_hook(lambda *args, ran=ran: ran.append(args))
        checkpoint.save(saved, step=0, run=f"{directory}/{name}")
        assert ran == []
        assert not optimizer.state
        checkpoint.restore(loaded, run=f"{directory}/{name}")
        for trained, with_optimizer in ((model, optimizer), (fresh, again), (untouched, other)):
            train(trained, with_optimizer, num_steps=2)
        expected = values(never_saved)
        assert_same(values(saved), expected)
        assert_same(values(loaded), expected)


@pytest.mark.parametrize("wrapping", ["fsdp1", "fsdp1_flat", "fsdp2"])
def test_a_save_before_the_first_step_is_not_seen_in_the_training_and_resumes_as_if_never_saved(wrapping, tmp_path):
    passed(run_ranks(2, before_the_first_step, str(tmp_path), wrapping))


def kept_after_a_save(directory: str) -> int:
    warnings.simplefilter("ignore")
    model, optimizer, _, state = parts("fsdp1", 1)
    train(model, optimizer, num_steps=1)
    handed_out: list[weakref.ref[torch.Tensor]] = []

    def noted(*args: Any, **options: Any) -> Any:
        found = get_optimizer_state_dict(*args, **options)
        for of_parameter in found["state"].values():
            for value in of_parameter.values():
                if hasattr(value, "local_shards"):
                    handed_out.extend(weakref.ref(shard.tensor) for shard in value.local_shards())
        return found

    fsdp1_optimizer.get_optimizer_state_dict = noted
    checkpoint.save(state, step=1, run=directory)
    gc.collect()
    assert handed_out
    return sum(ref() is not None for ref in handed_out)


def test_what_fsdp1_clones_for_a_save_is_let_go_after_it(tmp_path):
    assert passed(run_ranks(2, kept_after_a_save, str(tmp_path))) == [0, 0]


class Invented(torch.optim.Optimizer):
    def __init__(self, parameters: Any, make: Any) -> None:
        self.make = make
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter].update(self.make(parameter))


def refused() -> list[str]:
    makes = {
        "factored": lambda p: {"row": p.to_local().float().sum(-1)},
        "quantised": lambda p: {"codes": p.to_local().to(torch.uint8)},
        "scalar": lambda p: {"scale": p.to_local().abs().max()},
        "number": lambda p: {"scale": float(p.to_local().abs().max())},
        "partial": lambda p: {"norm": p.sum()},
    }
    messages = []
    for make in makes.values():
        model = fsdp2(nn.Linear(8, 8, bias=False))
        optimizer = Invented(model.parameters(), make)
        try:
            OptimizerState(model, optimizer).state_dict()
        except UnsupportedState as error:
            messages.append(error.key)
    return messages


def test_state_that_is_one_ranks_own_beside_a_sharded_parameter_is_refused_by_name():
    keys = [f"state.weight.{name}" for name in ("row", "codes", "scale", "scale", "norm")]
    assert run_ranks(2, refused) == [keys] * 2


def round_trips(directory: str) -> None:
    def make(parameter: torch.Tensor) -> dict[str, Any]:
        assert isinstance(parameter, DTensor)
        whole = parameter.full_tensor()
        return {
            "step": torch.tensor(4.0),
            "num_updates": 4,
            "codes": (parameter * 100).to(torch.int8),
            "norm": DTensor.from_local(whole.norm(), parameter.device_mesh),
        }

    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = fsdp2(nn.Linear(8, 3))
        models.append((model, Invented(model.parameters(), make)))
    (model, optimizer), (fresh, again) = models
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    dcp.save({"o": OptimizerState(model, optimizer)}, checkpoint_id=directory)
    loaded = OptimizerState(fresh, again)
    dcp.load({"o": loaded}, checkpoint_id=directory)
    assert_same(leaves(loaded.state_dict()), leaves(OptimizerState(model, optimizer).state_dict()))
    assert again.state[fresh.weight]["codes"].dtype == torch.int8


def test_sharded_8_bit_state_and_replicated_scalars_come_back(tmp_path):
    passed(run_ranks(2, round_trips, str(tmp_path)))


def factored() -> str:
    *_, state = parts("fsdp2", 1, torch.optim.Adafactor)
    try:
        state["optimizer"].state_dict()
    except UnsupportedState as error:
        return error.key
    return "accepted"


def test_adafactor_which_torch_can_not_step_on_shards_is_refused_by_name():
    assert run_ranks(2, factored) == ["Adafactor"] * 2


class FirstStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)


class LastStage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)


PIPELINES = {"gloo": dist.new_group, "a device's": group_of_a_device}


def stages(directory: str, backend: str) -> None:
    rank, group = dist.get_rank(), PIPELINES[backend]()
    make = FirstStage if rank == 0 else LastStage
    torch.manual_seed(rank)
    saved, fresh = make(), make()
    optimizers = [torch.optim.AdamW(model.parameters()) for model in (saved, fresh)]
    for parameter in saved.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers[0].step()
    state = {"model": ModelState(saved, pp_group=group), "optimizer": OptimizerState(saved, optimizers[0])}
    dcp.save(state, checkpoint_id=directory)
    again = {"model": ModelState(fresh, pp_group=group), "optimizer": OptimizerState(fresh, optimizers[1])}
    dcp.load(again, checkpoint_id=directory)
    assert_same(values(again), values(state))

    # A checkpoint of the undivided, tied model: no head, and the embedding is in another stage.
    embedding = torch.full((11, 8), 3.0)
    part = ModelState(make(), pp_group=group)
    given = {"embed_tokens.weight": embedding} if rank == 0 else nn.LayerNorm(8).state_dict(prefix="norm.")
    part.load_state_dict(dict(given))
    judged = part.reconcile(frozenset({"lm_head.weight"}), frozenset())
    if rank == 1:
        assert torch.equal(part.model[0].lm_head.weight, embedding)
        assert judged.instead == {"lm_head.weight": "embed_tokens.weight"}
    assert judged.problems == ()


@pytest.mark.parametrize("backend", PIPELINES)
def test_every_stage_of_a_pipeline_comes_back_and_a_head_is_taken_from_another_stages_embedding(backend, tmp_path):
    passed(run_ranks(2, stages, str(tmp_path), backend))


def plain_stage(stages: list[int], rate: float) -> OptimizerState:
    """SGD of some stages of a pipeline, with a group for each and no state at all."""
    model = nn.ModuleDict({f"stage_{stage}": nn.Linear(2, 2) for stage in stages})
    # The last stage has nothing to train.
    groups = [{"params": list(model[f"stage_{s}"].parameters()) if s < 2 else [], "lr": rate * (1 + s)} for s in stages]
    return OptimizerState(model, torch.optim.SGD(groups))


def stages_without_state(run: str) -> None:
    logging.disable(logging.INFO)
    checkpoint.save({"optimizer": plain_stage([dist.get_rank()], 0.5)}, step=1, run=run)
    fresh = plain_stage([dist.get_rank()], 0.0)
    report = checkpoint.restore({"optimizer": fresh}, run=run)
    assert [part.outcome for part in report.parts] == ["exact"]
    if dist.get_rank() < 2:
        assert fresh.optimizer[0].param_groups[0]["lr"] == 0.5 * (1 + dist.get_rank())


def test_optimizers_without_state_of_a_pipelines_stages_come_back_also_on_another_number_of_ranks(tmp_path):
    passed(run_ranks(3, stages_without_state, str(tmp_path)))
    whole = plain_stage([0, 1, 2], 0.0)
    report = checkpoint.restore({"optimizer": whole}, run=str(tmp_path))
    assert [part.outcome for part in report.parts] == ["exact"]
    assert [group["lr"] for group in whole.optimizer[0].param_groups] == [0.5, 1.0, 0.0]


_MANY_HEADS = """
import sys
import torch, torch.distributed as dist
from ray_stateful.stateful_wrappers import ModelState
from tests.ranks.test_wrappers import FirstStage, LastStage

rank, directory = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{directory}/met", rank=rank, world_size=2)
models = [(FirstStage, LastStage)[rank]() for _ in range(6)]
given = {
    f"part_{number}.{name}": torch.full_like(value, float(number))
    for number, model in enumerate(models)
    for name, value in model.state_dict().items()
    if name != "lm_head.weight"
}
ModelState(models, pp_group=dist.group.WORLD).load_state_dict(given)
print([{value.unique().tolist()[0] for value in model.state_dict().values()} for model in models])
dist.barrier()
"""


def test_stages_whose_sets_are_in_another_order_fetch_many_heads_in_the_same_one(tmp_path):
    # The workers of a job have hash seeds of their own; the ranks of `run_ranks` have the one of their server.
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _MANY_HEADS, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONHASHSEED": str(rank)},
        )
        for rank in range(2)
    ]
    assert [process.communicate(timeout=80)[0] for process in processes] == [f"{[{float(n)} for n in range(6)]}\n"] * 2


class Adapted(nn.Module):
    def __init__(self, name: str, rank: int = 2) -> None:
        super().__init__()
        layer = nn.Linear(4, 4).requires_grad_(False)
        layer.lora_A = nn.Linear(4, rank, bias=False)
        self.add_module(name, layer)


def adapted_stages(backend: str) -> list[str]:
    rank, group = dist.get_rank(), PIPELINES[backend]()
    torch.manual_seed(rank)
    saved, fresh = Adapted(f"layer_{rank}"), Adapted(f"layer_{rank}")
    if rank == 1:
        saved, fresh = nn.ModuleDict({"norm": saved}), nn.ModuleDict({"norm": fresh})
    state = ModelState(saved, is_peft=True, pp_group=group).state_dict()
    ModelState(fresh, is_peft=True, pp_group=group).load_state_dict(state)
    assert_same(dict(snapshot_trained(fresh)), dict(snapshot_trained(saved)))
    if rank == 1:
        fresh = nn.ModuleDict({"norm": Adapted("layer_1", rank=8)})
    before = copy.deepcopy(snapshot_trained(fresh))
    # By the rank whose stage fits too, which otherwise waits for one that has given up.
    with pytest.raises(ValueError, match=r"layer_1\.lora_A\.weight: \(2, 4\) given, \(8, 4\) in the model"):
        ModelState(fresh, is_peft=True, pp_group=group).load_state_dict(state)
    assert_same(snapshot_trained(fresh), before)
    return sorted(state)


def snapshot_trained(model: nn.Module) -> dict[str, Any]:
    return leaves({n.replace("module.", ""): p for n, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("backend", PIPELINES)
def test_the_adapters_of_all_stages_are_joined_on_rank_0_and_refused_by_all_if_one_does_not_fit(backend):
    joined = ["base_model.model.layer_0.lora_A.weight", "base_model.model.norm.layer_1.lora_A.weight"]
    assert passed(run_ranks(2, adapted_stages, backend)) == [joined, []]


def adapter(directory: str, wrapping: str) -> int:
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    alone = peft_models.build("score", 1)
    peft_models.nudge(alone)
    # The heads of a fresh model are random, and must be the saved one's after loading.
    saved, fresh = (WRAPPINGS[wrapping](copy.deepcopy(m)) for m in (alone, peft_models.build("score", 2)))
    part = ModelState(saved, is_peft=True)
    state = part.state_dict()
    assert all(type(value) is torch.Tensor and value.device.type == "cpu" for value in state.values())
    dcp.save({"model": part}, checkpoint_id=directory)
    again = ModelState(fresh, is_peft=True)
    dcp.load({"model": again}, checkpoint_id=directory)
    assert_same(again.state_dict(), state)
    if dist.get_rank() == 0:
        from peft import get_peft_model_state_dict

        assert_same(state, get_peft_model_state_dict(alone, save_embedding_layers=False))
    again = ModelState(WRAPPINGS[wrapping](peft_models.build("score", 3)), is_peft=True)
    again.load_state_dict(state)
    assert_same(again.state_dict(), state)
    return len(state)


@pytest.mark.parametrize("wrapping", ["ddp", "fsdp1", "fsdp2", "compiled"])
def test_an_adapter_is_whole_on_rank_0_and_loading_broadcasts_it(wrapping, tmp_path):
    assert passed(run_ranks(2, adapter, str(tmp_path), wrapping)) == [5, 0]


def save_adapter(run: str) -> dict[str, Any]:
    logging.disable(logging.INFO)
    model = peft_models.build("score", 1)
    peft_models.nudge(model)
    part = ModelState(fsdp2(model), is_peft=True)
    checkpoint.save({"adapter": part}, step=1, run=run)
    return part.state_dict()


def restore_adapter(run: str, expected: dict[str, Any]) -> str:
    logging.disable(logging.INFO)
    part = ModelState(fsdp2(peft_models.build("score", 2)), is_peft=True)
    report = checkpoint.restore({"adapter": part}, run=run)
    assert_same(part.state_dict(), expected if dist.get_rank() == 0 else {})
    return str(report)


def test_an_adapter_that_one_rank_holds_is_saved_and_restored_by_any_number_of_ranks(tmp_path):
    expected = passed(run_ranks(2, save_adapter, str(tmp_path)))[0]
    for report in passed(run_ranks(3, restore_adapter, str(tmp_path), expected)):
        assert f"{len(expected)} tensors; adapter" in report


def untied_from_tied() -> list[str]:
    *_, state = parts("fsdp2", 1)
    saved = {
        key: value.full_tensor() if isinstance(value, DTensor) else value
        for key, value in snapshot(state["model"]).items()
    }
    *_, fresh = parts("fsdp2", 2, tied=False)
    fresh["model"].load_state_dict(saved)
    assert torch.equal(fresh["model"].state_dict()["lm_head.weight"].full_tensor(), saved["embed_tokens.weight"])
    return list(fresh["model"].notes)


def test_a_sharded_head_is_filled_from_the_embedding():
    assert run_ranks(2, untied_from_tied) == [["lm_head.weight is taken from embed_tokens.weight"]] * 2
