"""What a part of the state may say about itself. All of it is optional: any `Stateful` is a part.

`save` and `restore` take a dict of name to part. A part of none of the classes below is saved under its name, key by
key, one copy for all ranks, and gets back what was saved, structure included. To say more, derive from one of these:

    StrictPart    its keys are known beforehand and must be those of the checkpoint (models, optimizers)
    RankPart      its value differs from rank to rank, and it has a rule for other numbers of ranks (random streams)

Any part may also have

    describe() -> str                             one line for the resume report, asked after loading
    check_saving() -> None                        raises `UnsupportedState` if what `state_dict` has just returned must
                                                  not be saved, though it may be loaded into
    check_saved(saved) -> tuple[str, ...]         what keeps `saved` (tensors in it not yet filled) from being loaded,
                                                  one line each; asked before anything is loaded
    check_resized(saved) -> tuple[str, ...]       the same, asked of a `RankPart` at a different world size: `saved`
                                                  has the values of all ranks that saved, by rank
    changed_from(saved) -> tuple[str, ...]        what will not be as it was saved, in a few words each: the report then
                                                  says "changed", not "exact"; asked at the same time
    on_step(step=...) -> None                     told by `Checkpointer.step` that an optimizer step was completed
    samples: int                                  samples trained so far, for the manifest
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciled:
    """What a strict part says about keys that only its state dict has, or only the checkpoint.

    `problems` are fatal, one line per key; `notes` go to the resume report. `instead` maps a missing key to the
    checkpoint's key whose value is read into it. `is_partial` says that something here stays as built, or something in
    the checkpoint is not loaded: the report then does not call the part exact.
    """

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    instead: Mapping[str, str] = field(default_factory=dict)
    is_partial: bool = False


class StrictPart(ABC):
    """A part whose state dict, before loading, already has the keys and tensors to be filled.

    A dict without tensors is stored as one value, which is the same on all ranks and is taken whole. `by_key` names
    dicts in the state dict whose entries, like those of the state dict itself, are stored and judged one by one even
    so: those that have other entries on other ranks.
    """

    by_key: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def reconcile(self, missing: frozenset[str], unexpected: frozenset[str]) -> Reconciled:
        """Judge the differences before anything is loaded. Called on every rank with the same sets.

        Args:
            missing: Flat keys of some rank's state dict, without this part's name, that the checkpoint lacks.
            unexpected: Flat keys of the checkpoint under this part's name that no rank's state dict has.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Who saved, and who restores. `step` counts the optimizer steps completed when the checkpoint was saved."""

    saved_world_size: int
    world_size: int
    rank: int
    step: int

    @property
    def resized(self) -> bool:
        return self.saved_world_size != self.world_size


class RankPart(ABC):
    """A part that is one value per rank, saved under `<name>.rank_<r>`.

    At equal world size `load_state_dict` gets this rank's value back. At a different one, `resize` is called instead.
    `loads_last` is for a part that loading others may change, such as a random stream, from which they may draw.
    """

    loads_last: ClassVar[bool] = False
    resized_as: ClassVar[str] = "resized"

    @abstractmethod
    def check_resize(self, name: str, world: World) -> None:
        """Refuse a different number of ranks, before anything is loaded. Called on every rank.

        Raises:
            ResizeRefused: there is no rule; names the part and what to do.
        """

    @abstractmethod
    def resize(self, saved: Mapping[int, Mapping[str, Any]], world: World) -> str:
        """Derive this rank's value from those of all ranks that saved, load it, and return in a few words how."""


def problems_of_all(check: Callable[[Any], tuple[str, ...]], saved: Mapping[int, Any]) -> tuple[str, ...]:
    """What `check` says of the values of all ranks that saved, each problem once."""
    return tuple(dict.fromkeys(problem for value in saved.values() for problem in check(value)))
