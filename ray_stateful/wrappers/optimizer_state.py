"""Optimizers and schedulers as a `Stateful`, by parameter name, and what may differ when they come back."""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from ray_stateful.states.part import Reconciled, StrictPart
from ray_stateful.wrappers import model_keys, optimizer_keys, schedulers, shards
from ray_stateful.wrappers.fsdp1_optimizer import Fsdp1Optimizer
from ray_stateful.wrappers.optimizer_start import check_step, state_holder
from ray_stateful.wrappers.optimizer_values import BoundOptimizer, bind

_log = logging.getLogger(__name__)


class OptimizerState(StrictPart):
    """Optimizers and learning rate schedulers as a `Stateful`: `{"optim": ..., "sched": ...}`.

    `optim` is flat and by parameter name, so parameters may be regrouped between save and load. A parameter that never
    had a gradient is stored, and loaded, as one that never stepped. A parameter that the checkpoint has no state for
    starts fresh; gradients are left alone.

    Args:
        model: The module or modules whose parameters are optimized, wrapped as in `ModelState`.
        optimizer: One optimizer, or several with parameters of their own; with FSDP1, one for each module.
        scheduler: Anything with `state_dict` and `load_state_dict`, or several of them: those are `sched.<i>`.
        is_peft: Accepted for upstream's callers, without effect: frozen parameters have no state to begin with.
        cpu_offload: Tensors are copied to host memory, so they do not alias the optimizer's.
        strict: State that has no place here, or only part of a parameter's state, is an error; otherwise it is noted.
            Schedulers of a different kind, or fewer than were saved, are always an error: the schedule would be neither
            the saved one nor the one built here.

    Raises:
        UnsupportedState: an optimizer wraps another one, which keeps the state.
    """

    # SGD without momentum has no tensors, and the stages of a pipeline have different parameters.
    by_key = ("optim",)

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer | Sequence[Optimizer],
        scheduler: Any | None = None,
        is_peft: bool = False,
        cpu_offload: bool = False,
        strict: bool = True,
    ) -> None:
        self.model = model_keys.parts_of(model)
        self.optimizer = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        if scheduler is None:
            self.scheduler: list[Any] = []
        else:
            self.scheduler = list(scheduler) if isinstance(scheduler, (list, tuple)) else [scheduler]
        if any(isinstance(one, Optimizer | nn.Module) for one in self.scheduler):
            raise ValueError("scheduler is an optimizer or a module: OptimizerState(model, optimizer, scheduler)")
        self.is_peft = is_peft
        self.cpu_offload = cpu_offload
        self.strict = strict
        # What the last load left as built or could not take over, one line each.
        self.notes: tuple[str, ...] = ()
        self._bound = _bound(self.model, [state_holder(optimizer) for optimizer in self.optimizer])

    def state_dict(self) -> dict[str, Any]:
        """The state; tensors alias the optimizer's own. Collective for FSDP1.

        Raises:
            UnsupportedState: an entry of the optimizer's state can't be loaded by other ranks; names the entry. Or the
                optimizer can't step without an argument, such as a closure.
        """
        optim: dict[str, Any] = {}
        for optimizer in self._bind():
            check_step(optimizer.optimizer)
            flat = optimizer.state_dict()
            shared = sorted(flat.keys() & optim.keys())
            if shared:
                raise ValueError(f"two optimizers hold the parameter of {shared[0]!r}; give it to one of them")
            optim.update(flat)
        if self.cpu_offload:
            optim = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in optim.items()}
        return {"optim": optim, **({"sched": schedulers.collect(self.scheduler)} if self.scheduler else {})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned, or the checkpoint's part of it; or torch's nested layout in `optim`.

        Raises:
            ValueError: hyperparameters, shapes or schedulers do not fit; nothing was loaded.
        """
        flat = optimizer_keys.flatten(state_dict.get("optim", {}))
        bound = self._bind()
        for optimizer in bound:
            if isinstance(optimizer, Fsdp1Optimizer):
                optimizer.look()
        state, hyper = self._by_parameter(flat)
        groups, sched = self._saved_groups(hyper), state_dict.get("sched") or {}
        for optimizer in bound:
            optimizer.check(state, hyper)
        problems = schedulers.check(self.scheduler, sched, groups)
        if problems:
            raise ValueError("; ".join(problems))
        has_state = any(names for optimizer in bound for names in optimizer.expected.values())
        loaded = {key for optimizer in bound for key in optimizer.load(state, hyper)}
        trained = {key for optimizer in bound for key in optimizer.trained}
        _log.info("optimizer: loaded the state of %d parameters", len(loaded))
        # SGD without momentum has no state, here or in the checkpoint.
        fresh = trained - loaded if loaded or has_state else set()
        notes = [f"{optimizer_keys.some(fresh)} without optimizer state: fresh"] if fresh else []
        notes += schedulers.load(self.scheduler, sched, groups)
        self.notes = tuple(notes)
        for note in notes:
            _log.warning("optimizer: %s", note)

    def check_saved(self, saved: dict[str, Any]) -> tuple[str, ...]:
        """What keeps `saved` from being loaded: hyperparameters that differ within a group, and schedulers that differ.

        Hyperparameters in tensors are compared only once they are read.
        """
        flat = optimizer_keys.flatten(saved.get("optim", {}))
        _, hyper = self._by_parameter(flat)
        problems: list[str] = []
        for optimizer in self._bound:
            try:
                optimizer.check_groups(hyper)
            except ValueError as error:
                problems.append(str(error))
        sched, groups = saved.get("sched") or {}, self._saved_groups(hyper)
        if schedulers.has_tensors([sched, groups]):
            groups = [None] * len(groups)
        try:
            problems += schedulers.check(self.scheduler, sched, groups)
        # A list in the place of a dict, a text in that of a rate: a checkpoint may have anything under these names.
        except (AttributeError, TypeError) as error:
            problems.append(f"sched is the state of no scheduler of ours: {type(error).__name__}: {error}")
        return tuple(problems)

    def changed_from(self, saved: dict[str, Any]) -> tuple[str, ...]:
        """What will not be as it was saved in the schedulers, one line each; changes nothing."""
        sched = saved.get("sched") or {}
        return tuple(schedulers.differences(self.scheduler, sched)) if sched else ()

    def reconcile(self, missing: frozenset[str], unexpected: frozenset[str]) -> Reconciled:
        """Decide which missing and unexpected keys are harmless, for the last result of `state_dict`."""
        bound = self._bind()
        problems, notes = optimizer_keys.judge(
            _under("optim", missing),
            _under("optim", unexpected),
            {key: names for optimizer in bound for key, names in optimizer.expected.items()},
            frozenset(key for optimizer in bound for key in optimizer.trained),
        )
        notes += schedulers.judge(self.scheduler, _under("sched", missing), _under("sched", unexpected))
        if not self.strict:
            problems, notes = [], problems + notes
        # A parameter without state in the checkpoint had none in the saved run, and has none after loading.
        is_partial = bool(unexpected) or any(not key.startswith("optim.state.") for key in missing)
        return Reconciled(problems=tuple(problems), notes=tuple(notes), is_partial=is_partial)

    def describe(self) -> str:
        """One line for the resume report: `AdamW, 2 groups; scheduler LambdaLR at step 1200`."""
        words = []
        for optimizer in self.optimizer:
            num_groups = len(optimizer.param_groups)
            words.append(f"{type(optimizer).__name__}, {num_groups} group{'s' if num_groups != 1 else ''}")
        return "; ".join([*words, *schedulers.describe(self.scheduler), *self.notes])

    def _by_parameter(self, flat: dict[str, Any]) -> tuple[optimizer_keys.ByName, optimizer_keys.ByName]:
        # Split once for all groups and optimizers: there may be one for each parameter.
        return optimizer_keys.by_parameter(flat, frozenset(key for bound in self._bound for key in bound.owned))

    def _saved_groups(self, hyper: optimizer_keys.ByName) -> list[schedulers.Groups]:
        """For each scheduler, the saved hyperparameters of its optimizer's groups; `None` if that is not ours."""
        found: list[schedulers.Groups] = []
        for scheduler in self.scheduler:
            groups = getattr(getattr(scheduler, "optimizer", None), "param_groups", None)
            members = next((bound.members() for bound in self._bound if bound.optimizer.param_groups is groups), None)
            if members is None:
                found.append(None)
            else:
                found.append([optimizer_keys.of_group(keys, hyper) if keys else None for keys in members])
        return found

    def _bind(self) -> list[BoundOptimizer | Fsdp1Optimizer]:
        """The optimizers, with their parameters bound to the names that these have now."""
        shards.reshard(self.model)
        names: dict[torch.Tensor, str] = {}
        for prefix, part in zip(model_keys.part_prefixes(self.model), self.model, strict=True):
            for name, parameter in model_keys.named_parameters(part):
                names.setdefault(parameter, prefix + name)
        for bound in self._bound:
            if isinstance(bound, BoundOptimizer):
                bound.keys = bind(bound.optimizer, names)
        return self._bound


def _under(name: str, keys: Set[str]) -> list[str]:
    return [key.removeprefix(f"{name}.") for key in keys if key.startswith(f"{name}.")]


def _bound(parts: list[nn.Module], optimizers: list[Optimizer]) -> list[BoundOptimizer | Fsdp1Optimizer]:
    if not any(FullyShardedDataParallel.fsdp_modules(part) for part in parts):
        return [BoundOptimizer(optimizer) for optimizer in optimizers]
    if len(parts) != len(optimizers):
        # torch can name flat parameters only for an optimizer over all parameters of one module.
        raise ValueError(
            f"{len(optimizers)} optimizers for {len(parts)} FSDP1 modules: give each module one optimizer, over all "
            "its parameters (groups of it may differ), or wrap the model with fully_shard"
        )
    return [Fsdp1Optimizer(model, optimizer) for model, optimizer in zip(parts, optimizers, strict=True)]
