"""What an attack is tried on: a small state with a part of each kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ray_stateful import ModelState, checkpoint
from ray_stateful.states.part import RankPart, Reconciled, StrictPart, World

WEIGHTS = "model.safetensors"


class Free(dict[str, Any]):
    """A part that takes whatever is there."""

    def state_dict(self) -> dict[str, Any]:
        return dict(self)

    def load_state_dict(self, value: Any) -> None:
        self.clear()
        self.update(value)


class Strict(StrictPart):
    """A part that knows its keys."""

    def __init__(self, fill: float) -> None:
        self.tensors = {"first": torch.full((4, 3), fill), "second": torch.full((5,), fill)}

    def state_dict(self) -> dict[str, Any]:
        return self.tensors

    def load_state_dict(self, value: Any) -> None:
        self.tensors = dict(value)

    def reconcile(self, missing: frozenset[str], unexpected: frozenset[str]) -> Reconciled:
        return Reconciled(problems=tuple(sorted(missing | unexpected)))


class PerRank(RankPart):
    """A part with a value for each rank."""

    def __init__(self, number: int) -> None:
        self.number = number

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, value: Any) -> None:
        self.number = value["number"]

    def check_resize(self, name: str, world: World) -> None:
        """Any number of ranks will do."""

    def resize(self, saved: Any, world: World) -> str:
        self.number = sum(value["number"] for value in saved.values())
        return "added up"


def saved_state() -> dict[str, Any]:
    torch.manual_seed(0)
    thing = Free(
        weights=torch.randn(40, 30),
        other=torch.randn(40, 30),
        layers=[torch.ones(2), torch.zeros(2)],
        counts={1: "one", "two": (2, 2.0)},
        name="a name",
    )
    return {"thing": thing, "model": Strict(1.0), "stream": PerRank(7)}


def fresh_state() -> dict[str, Any]:
    return {"thing": Free(), "model": Strict(0.0), "stream": PerRank(0)}


def save_weights(directory: Path) -> Path:
    """Intact safetensors of a model, for a run to begin from; returns their directory."""
    directory.mkdir()
    save_file(torch.nn.Linear(3, 2).state_dict(), directory / WEIGHTS)
    return directory


def fresh_model() -> dict[str, Any]:
    """A state whose model is of the kind of `save_weights`, all zeros."""
    model = torch.nn.Linear(3, 2)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    return {"model": ModelState(model)}


def is_untouched(state: dict[str, Any]) -> bool:
    if isinstance(state["model"], ModelState):
        return not any(value.any() for value in state["model"].state_dict().values())
    return not state["thing"] and not state["model"].tensors["first"].any() and state["stream"].number == 0


def save(run: Path) -> Path:
    """An intact checkpoint, the only one of a run; returns its directory."""
    return run / checkpoint.save(saved_state(), step=1, run=str(run)).name
