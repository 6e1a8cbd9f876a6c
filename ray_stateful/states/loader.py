"""A loader that knows its own position, saved per rank; and the rules for a different number of workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ray_stateful.errors import ResizeRefused
from ray_stateful.states.part import RankPart, World, problems_of_all


class StatefulLoader(Protocol):
    """Anything with these two methods, such as `torchdata.stateful_dataloader.StatefulDataLoader`."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class ResizeRule(ABC):
    """What becomes of per-rank loader states when there are more or fewer ranks."""

    def check(self, name: str, world: World) -> None:  # noqa: B027 - most rules have nothing to refuse
        """Raise `ResizeRefused` if the run can't go on. Called before anything is loaded, on every rank."""

    @abstractmethod
    def apply(self, loader: StatefulLoader, saved: Mapping[int, Any], world: World) -> str:
        """Position `loader`, given the states of all ranks that saved; returns in a few words how."""


@dataclass(frozen=True, slots=True)
class Refuse(ResizeRule):
    """Do not go on: positions of four shards are not positions of three."""

    def check(self, name: str, world: World) -> None:
        raise ResizeRefused(
            name,
            world.saved_world_size,
            world.world_size,
            f"resume on {world.saved_world_size} workers, or give LoaderState(on_resize=Merge(function)) or "
            "LoaderState(on_resize=Restart())",
        )

    def apply(self, loader: StatefulLoader, saved: Mapping[int, Any], world: World) -> str:
        raise AssertionError("check refuses before")


@dataclass(frozen=True, slots=True)
class Restart(ResizeRule):
    """Leave the loader at its beginning: samples already seen in this epoch are seen again."""

    def apply(self, loader: StatefulLoader, saved: Mapping[int, Any], world: World) -> str:
        return (
            f"restarted: {len(saved)} positions saved, {world.world_size} workers; samples of this epoch are seen again"
        )


@dataclass(frozen=True, slots=True)
class Merge(ResizeRule):
    """Let `function(saved, world)` make this rank's loader state from those of all ranks that saved."""

    function: Callable[[Mapping[int, Any], World], dict[str, Any]]

    def apply(self, loader: StatefulLoader, saved: Mapping[int, Any], world: World) -> str:
        loader.load_state_dict(self.function(saved, world))
        name = getattr(self.function, "__name__", type(self.function).__name__)
        return f"{len(saved)} positions saved, {world.world_size} workers: merged by {name}"


class LoaderState(RankPart):
    """A stateful loader as a part: exact on the number of workers that saved it, by `on_resize` on any other.

    A loader counts what it has yielded. This equals what was trained if it is saved between steps with no batch in
    hand, as a Checkpointer does; one that prefetches must count what it gives out, as StatefulDataLoader does.

    Right after a restore the loader is asked for its state once, which starts a StatefulDataLoader. Its next `iter`
    then draws nothing from torch's global stream, so that RandomState's restored position in that stream still holds.

    Args:
        loader: Restored in place.
        on_resize: `Refuse()`, `Restart()`, `Merge(function)`, or a rule of your own.
    """

    def __init__(self, loader: StatefulLoader, *, on_resize: ResizeRule | None = None) -> None:
        for method in ("state_dict", "load_state_dict"):
            if not callable(getattr(loader, method, None)):
                raise ValueError(
                    f"a {type(loader).__name__} has no {method}(), so its position can't be saved: give a "
                    "torchdata StatefulDataLoader, or use GlobalBatchSampler"
                )
        self._loader = loader
        self._rule = Refuse() if on_resize is None else on_resize

    def state_dict(self) -> dict[str, Any]:
        # Asking a StatefulDataLoader for its state starts it if it was not, which draws from torch's global stream.
        with torch.random.fork_rng(devices=[]):
            return {"loader": self._loader.state_dict()}

    def check_saved(self, saved: Mapping[str, Any]) -> tuple[str, ...]:
        """What keeps `saved` from being loaded, one line each; changes nothing."""
        is_ours = isinstance(saved, Mapping) and "loader" in saved
        return () if is_ours else ("no state of a loader is in the checkpoint: it is not one of ours",)

    def check_resized(self, saved: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
        """The same on a different number of ranks, each problem once."""
        return problems_of_all(self.check_saved, saved)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._loader.load_state_dict(state_dict["loader"])
        self._start()

    def check_resize(self, name: str, world: World) -> None:
        self._rule.check(name, world)

    def resize(self, saved: Mapping[int, Mapping[str, Any]], world: World) -> str:
        how = self._rule.apply(self._loader, {rank: state["loader"] for rank, state in saved.items()}, world)
        self._start()
        return how

    def _start(self) -> None:
        # Otherwise the next `iter` would draw from the global stream, where an uninterrupted run does not.
        self.state_dict()
