"""Models and optimizers through save and restore: what is on one side only is judged before anything is loaded."""

import pytest
import torch
from torch import nn

from ray_stateful import ModelState, OptimizerState, checkpoint
from ray_stateful.errors import SaveFailed, StateMismatch
from tests.part import Part, opened


class Model(nn.Module):
    def __init__(self, *, tied=True, extra=False, width=4):
        super().__init__()
        self.embed_tokens = nn.Embedding(7, width)
        self.body = nn.Linear(width, width)
        self.lm_head = nn.Linear(width, 7, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight
        if extra:
            self.more = nn.Linear(width, 1)

    def get_input_embeddings(self):
        return self.embed_tokens

    def forward(self, ids):
        return self.lm_head(self.body(self.embed_tokens(ids)))


def trained(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 30], gamma=0.5)
    for step in range(2):
        model(torch.tensor([[step, 2, 3]])).square().sum().backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, optimizer, scheduler


def state_of(model, optimizer=None, scheduler=None):
    state = {"model": ModelState(model)}
    return state if optimizer is None else state | {"optimizer": OptimizerState(model, optimizer, scheduler)}


def test_a_head_that_is_its_own_here_and_tied_in_the_checkpoint_is_loaded_from_the_embedding(tmp_path):
    tied = Model()
    checkpoint.save(state_of(tied), step=1, run=str(tmp_path))
    untied = Model(tied=False)

    checkpoint.restore(state_of(untied), run=str(tmp_path))

    assert torch.equal(untied.lm_head.weight, tied.embed_tokens.weight)
    assert torch.equal(untied.embed_tokens.weight, tied.embed_tokens.weight)
    assert untied.lm_head.weight is not untied.embed_tokens.weight


def test_optimizer_and_scheduler_go_on_and_milestones_keep_their_types(tmp_path):
    objects = trained(Model())
    checkpoint.save(state_of(*objects), step=2, run=str(tmp_path))
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.7)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5], gamma=0.1)

    report = checkpoint.restore(state_of(model, optimizer, scheduler), run=str(tmp_path))

    assert scheduler.state_dict() == objects[2].state_dict()
    assert type(scheduler.milestones) is type(objects[2].milestones)
    assert optimizer.param_groups[0]["lr"] == objects[1].param_groups[0]["lr"]
    for ours, theirs in zip(model.parameters(), objects[0].parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert all(torch.equal(optimizer.state[ours][key], value) for key, value in objects[1].state[theirs].items())
    assert "AdamW" in str(report)


def test_every_mismatch_is_listed_in_one_error_before_anything_is_touched(tmp_path):
    checkpoint.save(state_of(Model(extra=True)), step=1, run=str(tmp_path))
    other = Model(tied=False, width=5)
    before = {key: value.clone() for key, value in other.state_dict().items()}

    with pytest.raises(StateMismatch) as caught:
        checkpoint.restore(state_of(other), run=str(tmp_path))

    text = str(caught.value)
    assert "more.weight" in text
    assert "more.bias" in text
    assert "shape (7, 5) here, (7, 4) in the checkpoint" in text
    assert "model.body.weight" in text
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_a_tensor_that_is_part_of_another_value_in_the_checkpoint_is_a_mismatch(tmp_path):
    weights = ModelState(Model()).state_dict()
    without_body = {key: value for key, value in weights.items() if not key.startswith("body.")}
    checkpoint.save({"model": Part({**without_body, "body": {"no": 1}})}, step=1, run=str(tmp_path))

    with pytest.raises(StateMismatch, match=r"body\.weight"):
        checkpoint.restore(state_of(Model()), run=str(tmp_path))


def test_a_scheduler_that_is_only_in_the_checkpoint_is_said_and_left_alone(tmp_path):
    objects = trained(Model())
    checkpoint.save(state_of(*objects), step=2, run=str(tmp_path))
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    report = checkpoint.restore(state_of(model, optimizer), run=str(tmp_path))

    assert "scheduler, and there is none here: not loaded" in str(report)


def test_a_parameter_that_was_frozen_since_or_before_has_no_state_and_both_are_said(tmp_path):
    objects = trained(Model())
    checkpoint.save(state_of(*objects), step=2, run=str(tmp_path))
    model = Model()
    model.body.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)

    report = checkpoint.restore(
        {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}, run=str(tmp_path)
    )

    assert torch.equal(model.body.weight, objects[0].body.weight)
    assert "body" in str(report)


def test_groups_that_do_not_fit_are_refused_before_the_model_is_loaded(tmp_path):
    saved, fresh = Model(), Model()
    first, *rest = saved.parameters()
    groups = torch.optim.AdamW([{"params": [first], "lr": 0.5}, {"params": rest}])
    checkpoint.save(state_of(saved, groups), step=1, run=str(tmp_path))
    before = {name: value.clone() for name, value in fresh.state_dict().items()}

    with pytest.raises(StateMismatch, match=r"both parameters are in one group here"):
        checkpoint.restore(state_of(fresh, torch.optim.AdamW(fresh.parameters())), run=str(tmp_path))

    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_a_buffer_that_repeats_itself_is_refused_when_it_is_saved_not_when_it_is_missed(tmp_path):
    model = Model()
    model.register_buffer("mask", torch.ones(1, 3).expand(4, 3))

    with pytest.raises(SaveFailed, match=r"mask: a view that repeats .* \(4, 3\) .*clone\(\)"):
        checkpoint.save(state_of(model), step=1, run=str(tmp_path))


class Scaled(nn.Linear):
    """Has extra state in a dict, which it takes apart."""

    def __init__(self):
        super().__init__(4, 4)
        self.scales = {"largest": 1.0, "history": [1, 2]}

    def get_extra_state(self):
        return self.scales

    def set_extra_state(self, state):
        self.scales = {"largest": state["largest"], "history": state["history"]}


def two_layers(tied):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    if tied:
        model["c"].weight = model["a"].weight
    return model


def test_two_tensors_that_are_one_here_are_refused_unless_they_are_equal_in_the_checkpoint(tmp_path):
    fresh = two_layers(tied=True)
    before = fresh["a"].weight.detach().clone()
    checkpoint.save({"model": ModelState(two_layers(tied=False))}, step=1, run=str(tmp_path / "two"))
    with pytest.raises(StateMismatch, match=r"model.c.weight: the same tensor as a.weight here"):
        checkpoint.restore({"model": ModelState(fresh)}, run=str(tmp_path / "two"))
    assert torch.equal(fresh["a"].weight, before)

    saved = two_layers(tied=False)
    saved["c"].load_state_dict(saved["a"].state_dict())
    checkpoint.save({"model": ModelState(saved)}, step=1, run=str(tmp_path / "equal"))
    report = checkpoint.restore({"model": ModelState(fresh)}, run=str(tmp_path / "equal"))
    assert torch.equal(fresh["a"].weight, saved["a"].weight)
    assert [part.outcome for part in report.parts] == ["exact"]


def with_conjugates(seed):
    model = nn.Module()
    number = torch.randn(3, dtype=torch.complex64, generator=torch.Generator().manual_seed(seed))
    model.register_buffer("number", number)
    model.register_buffer("conjugate", number.conj())
    return model


def test_a_complex_buffer_and_its_conjugate_are_not_taken_for_one_tensor(tmp_path):
    saved, fresh = with_conjugates(1), with_conjugates(2)
    checkpoint.save({"model": ModelState(saved)}, step=1, run=str(tmp_path))
    checkpoint.restore({"model": ModelState(fresh)}, run=str(tmp_path))
    assert torch.equal(fresh.number, saved.number)
    assert torch.equal(fresh.conjugate, saved.conjugate)


def test_a_parameter_that_is_named_as_a_rank_is_the_models(tmp_path):
    def build(fill):
        model = nn.Linear(2, 2)
        model.rank_0 = nn.Parameter(torch.full((2,), fill))
        return model

    checkpoint.save({"model": ModelState(build(3.0))}, step=1, run=str(tmp_path))
    fresh = build(0.0)
    report = checkpoint.restore({"model": ModelState(fresh)}, run=str(tmp_path))

    assert torch.equal(fresh.rank_0, torch.full((2,), 3.0))
    assert [part.outcome for part in report.parts] == ["exact"]


def test_extra_state_in_a_dict_that_is_not_in_the_checkpoint_stays_as_it_is(tmp_path):
    saved, fresh = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(Scaled())
    checkpoint.save(state_of(saved), step=1, run=str(tmp_path))

    report = checkpoint.restore(state_of(fresh), run=str(tmp_path))

    assert "0._extra_state.largest is not in the checkpoint: kept as built" in str(report)
    assert fresh[0].scales == {"largest": 1.0, "history": [1, 2]}
    assert torch.equal(fresh[0].weight, saved[0].weight)


class Longer(nn.Linear):
    """Has extra state in a tensor, of a length that differs from version to version."""

    def __init__(self, length):
        super().__init__(4, 4)
        self.scales = torch.full((length,), float(length))

    def get_extra_state(self):
        return self.scales

    def set_extra_state(self, state):
        self.scales = state


def test_extra_state_of_another_size_is_left_alone_and_the_part_is_not_called_exact(tmp_path):
    saved, fresh = nn.Sequential(Longer(2)), nn.Sequential(Longer(3))
    checkpoint.save(state_of(saved), step=1, run=str(tmp_path))

    report = checkpoint.restore(state_of(fresh), run=str(tmp_path))

    assert outcomes(report) == {"model": "partial"}
    assert "0._extra_state is left alone: shape (3,) here, (2,) in the checkpoint" in str(report)
    assert torch.equal(fresh[0].scales, torch.full((3,), 3.0))
    assert torch.equal(fresh[0].weight, saved[0].weight)


def test_a_hyperparameter_in_a_dict_that_is_not_in_the_checkpoint_stays_as_it_is(tmp_path):
    saved, fresh = Model(), Model()
    one = torch.optim.AdamW([{"params": saved.body.parameters(), "clip": {"norm": 1.0}}])
    two = torch.optim.AdamW(
        [{"params": model, "clip": {"norm": 0.1}} for model in (fresh.body.parameters(), fresh.lm_head.parameters())]
    )
    checkpoint.save(state_of(saved, one), step=1, run=str(tmp_path))

    checkpoint.restore(state_of(fresh, two), run=str(tmp_path))

    assert [group["clip"] for group in two.param_groups] == [{"norm": 1.0}, {"norm": 0.1}]


def outcomes(report):
    return {part.name: part.outcome for part in report.parts}


def test_a_part_of_which_nothing_or_not_all_is_loaded_is_not_called_exact(tmp_path):
    saved = trained(Model())
    checkpoint.save(state_of(*saved), step=2, run=str(tmp_path))
    more, none = Model(extra=True), nn.ModuleDict({"other": nn.Linear(4, 4)})
    frozen, trains = Model(), Model()
    frozen.body.requires_grad_(False)
    parts = {
        "more": {"model": ModelState(more, strict=False)},
        "none": {"model": ModelState(none, strict=False)},
        "another optimizer": {"optimizer": OptimizerState(trains, torch.optim.SGD(trains.parameters()), strict=False)},
        "no scheduler": {"optimizer": OptimizerState(trains, torch.optim.AdamW(trains.parameters()))},
        "frozen": {"optimizer": OptimizerState(frozen, torch.optim.AdamW(frozen.parameters()), saved[2])},
    }

    reports = {case: checkpoint.restore(state, run=str(tmp_path)) for case, state in parts.items()}

    assert {case: [*outcomes(report).values()] for case, report in reports.items()} == {
        case: ["partial"] for case in parts
    }
    assert str(reports["more"]).count("more.weight is not in the checkpoint") == 1


def without_tensors(name, lr):
    model = nn.ModuleDict({name: nn.Linear(2, 2)})
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return model, optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 30], gamma=lr)


def save_without_tensors(part, is_tree, run):
    """Save `part`, or what it gives as one value: so it was stored before it was stored by key."""
    saved = opened(checkpoint.save({"optimizer": Part(part.state_dict()) if is_tree else part}, step=1, run=run))
    assert ("optimizer" in saved.trees) == is_tree


@pytest.mark.parametrize("is_tree", [True, False])
def test_an_optimizer_without_tensors_comes_back_also_from_a_checkpoint_that_has_it_as_one_value(is_tree, tmp_path):
    (_, optimizer, scheduler), (_, again, scheduler_again) = objects = (
        without_tensors("a", 0.5),
        without_tensors("a", 0.1),
    )
    saved, fresh = (OptimizerState(*of) for of in objects)
    optimizer.step()
    scheduler.step()
    save_without_tensors(saved, is_tree, str(tmp_path))
    report = checkpoint.restore({"optimizer": fresh}, run=str(tmp_path))

    assert outcomes(report) == {"optimizer": "exact"}
    assert again.state_dict() == optimizer.state_dict()
    assert scheduler_again.state_dict() == scheduler.state_dict()
    assert type(scheduler_again.milestones) is type(scheduler.milestones)


@pytest.mark.parametrize("is_tree", [True, False])
def test_an_optimizer_without_tensors_is_not_called_exact_if_no_parameter_is_one_that_was_saved(is_tree, tmp_path):
    save_without_tensors(OptimizerState(*without_tensors("a", 0.5)[:2]), is_tree, str(tmp_path))
    model, optimizer, _ = without_tensors("b", 0.1)
    report = checkpoint.restore({"optimizer": OptimizerState(model, optimizer)}, run=str(tmp_path))

    assert outcomes(report) == {"optimizer": "partial"}
    assert "lr of b.bias, b.weight is not in the checkpoint" in str(report)
    assert "param_groups.a.bias.dampening" in str(report)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_what_had_no_gradient_had_no_state_and_is_exact_without(tmp_path):
    models = [Model(extra=True) for _ in range(2)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.5) for m in models]
    models[0](torch.tensor([[1, 2]])).sum().backward()
    optimizers[0].step()
    checkpoint.save(state_of(models[0], optimizers[0]), step=1, run=str(tmp_path))

    report = checkpoint.restore(state_of(models[1], optimizers[1]), run=str(tmp_path))

    assert outcomes(report) == {"model": "exact", "optimizer": "exact"}
    assert models[1].more.weight not in optimizers[1].state
