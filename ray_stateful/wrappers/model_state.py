"""A model as a `Stateful`: which of its entries are stored, and what may differ when they come back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence, Set
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from ray_stateful.errors import UnsupportedState
from ray_stateful.ranks import on_host
from ray_stateful.states.part import Reconciled, StrictPart
from ray_stateful.wrappers import adapters, dense, model_keys, shards

_log = logging.getLogger(__name__)

_NO_ADAPTER = (
    "none of them is of the adapter that is trained here (is_peft): give an adapter's own weights "
    "(adapter_model.safetensors, or a checkpoint of one), and load the base model before the adapter is put on it"
)


class ModelState(StrictPart):
    """A model's parameters and buffers as a `Stateful`.

    A dense model gives every rank its own shards: DTensors that alias the live parameters, without a gather, so a
    save in the background must copy them before the next step. A head that is actually tied to the embedding is left
    out. With `is_peft` the state is only what is trained (adapters, `modules_to_save`, score heads), without buffers:
    whole, in rank 0's host memory, under `base_model.model.`, and `{}` on the other ranks; loading broadcasts it.

    Args:
        model: The module, wrapped in any way; or the parts of it that this rank has, in a pipeline. Parts share one
            name space, unless two of them use one name for different parameters: then each has its own, `part_<i>.`.
        is_peft: The state is the adapter alone.
        is_init_step: The base model is to be loaded before training: adapters are left out, and it is no error if the
            base checkpoint lacks entries.
        skip_task_head_prefixes: Entries whose names start with one of these, such as heads that no base model has, are
            left out while a base is loaded (with `is_init_step`, and in `restore(..., initial=...)`) and keep their
            fresh values. A save, or a restore from a checkpoint of the run, includes them.
        cpu_offload: Tensors are copied to host memory, so they do not alias the model.
        pp_group: The ranks of one pipeline. Adapters of all stages are joined over it, and a head may be loaded from
            the embedding of a different stage. If given, saving and loading are collective over it. For a group with
            NCCL alone, all ranks of the world make a gloo group at the first use: each of them is in a pipeline.
        strict: Missing and unexpected keys are errors; otherwise they are noted.
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        is_peft: bool = False,
        is_init_step: bool = False,
        skip_task_head_prefixes: Sequence[str] | None = None,
        cpu_offload: bool = False,
        pp_group: dist.ProcessGroup | None = None,
        strict: bool = True,
    ) -> None:
        self.model = model_keys.parts_of(model)
        self.is_peft = is_peft
        self.is_init_step = is_init_step
        self.skip_task_head_prefixes = tuple(skip_task_head_prefixes or ())
        self.cpu_offload = cpu_offload
        self.pp_group = pp_group
        self.strict = strict
        # What the last load left out, kept as built or took from elsewhere, one line each.
        self.notes: tuple[str, ...] = ()
        self._num_loaded: int | None = None
        self._is_initial = False
        # Keys under which two parts had different values in the last `state_dict`.
        self._different: list[str] = []

    def while_initial(self) -> ModelState:
        """The same model while its initial weights are loaded: without the heads of `skip_task_head_prefixes`.

        Unlike with `is_init_step`, it is an error here if the base lacks entries.
        """
        view = copy.copy(self)
        view._is_initial = True
        return view

    def state_dict(self) -> dict[str, Any]:
        """The state, flat, by canonical name. Collective for FSDP1, for adapters, and with a `pp_group`."""
        shards.reshard(self.model)
        if self._whole_adapter:
            whole = adapters.collect(self._parts(), self._pipeline())
            return {key: value for key, value in whole.items() if not self._is_skipped(key)}
        own = [(prefix + name, value) for prefix, part in self._parts() for name, value in self._own(part).items()]
        state, self._different = dense.joined(own)
        return state

    def check_saving(self) -> None:
        """Refuse to save parts that have different values under one key: one of the values would be lost.

        A checkpoint may be loaded into such parts: it gives all of them the same value.

        Raises:
            UnsupportedState: names the first such key of the last `state_dict`.
        """
        for key in self._different:
            raise UnsupportedState(
                key,
                "an entry that two parts of the model have, with different values,",
                "give each of them a ModelState of its own, or name the entries apart",
            )

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool | None = None) -> None:
        """Load what `state_dict` returned, or the checkpoint's part of it; `state_dict` itself is not changed.

        Args:
            strict: Overrides the constructor's.

        Raises:
            ValueError: keys are missing or unexpected and `strict` is set; lists them, and nothing was loaded.
        """
        shards.reshard(self.model)
        if self._whole_adapter:
            self.notes = ()
            self._num_loaded = adapters.load(
                self._parts(), state_dict, self._pipeline(), lambda missing, extra: self._accept(missing, extra, strict)
            )
            return
        given = dict(state_dict)
        own = [self._own(part) for part in self.model]
        keys = {prefix + name for prefix, names in zip(self._prefixes(), own, strict=True) for name in names}
        substitutes = self._fill_in_heads(keys, given)
        self._accept(keys - given.keys(), given.keys() - keys - set(substitutes.values()), strict)
        self.notes += tuple(f"{key} is taken from {source}" for key, source in sorted(substitutes.items()))
        values = [
            {name: given[prefix + name] for name in names if prefix + name in given}
            for prefix, names in zip(self._prefixes(), own, strict=True)
        ]
        dense.check_shapes(own, values)
        for part, mine, theirs in zip(self.model, own, values, strict=True):
            dense.load(part, mine, theirs)
        self._num_loaded = sum(map(len, values))

    def reconcile(self, missing: frozenset[str], unexpected: frozenset[str]) -> Reconciled:
        """Decide which missing and unexpected keys are harmless. Collective with FSDP1 or a `pp_group`."""
        shards.reshard(self.model)
        renamed: dict[str, str] = {}
        taken: dict[str, str] = {}
        if self._whole_adapter:
            stored = adapters.stored_keys(self._parts())
            spelt = {other: key for key, others in stored.items() for other in others}
            taken = {spelt[key]: key for key in unexpected if spelt.get(key) in missing}
            everyones = set().union(*self._gather({key for key in stored if not self._is_skipped(key)}))
        else:
            own = {prefix + name for prefix, part in self._parts() for name in self._own(part)}
            everyones = set().union(*self._gather(own))
            bare = {model_keys.without_wrappers(key): key for key in sorted(unexpected)}
            renamed = {key: bare[key] for key in missing if key in bare}
            taken = self._substitutes(set(missing - renamed.keys()), (everyones - missing) | bare.keys())
            taken = {key: bare.get(source, source) for key, source in taken.items()}
        found = {**renamed, **taken}
        # Each stage finds substitutes for its own head only, but no stage may report a head missing that another found.
        solved = set().union(*self._gather(set(found)))
        if self._is_initial and self._whole_adapter and unexpected and not solved and missing >= everyones:
            return Reconciled(problems=(f"{len(unexpected)} tensors, and {_NO_ADAPTER}",))
        skipped = self._skipped_names()
        extra = {key for key in unexpected - set(found.values()) if model_keys.without_wrappers(key) not in skipped}
        judged = self._judge(missing - solved, extra, None)
        notes = [f"{key} is taken from {source}" for key, source in sorted(taken.items())]
        if renamed:
            notes.append(f"{len(renamed)} names come from a wrapped model, for example {min(renamed.values())}")
        notes += [f"{name} is left out on request: kept as built" for name in skipped]
        is_partial = bool(missing - solved or extra or skipped)
        return Reconciled(problems=judged.problems, notes=(*judged.notes, *notes), instead=found, is_partial=is_partial)

    def describe(self) -> str:
        """One line for the resume report: how much was loaded, and the notes of the last load."""
        tied = [head for part in self.model if (pair := model_keys.tied_head(part)) for head in pair[:1]]
        words = [] if self._num_loaded is None else [f"{self._num_loaded} tensors"]
        words += ["adapter"] if self._whole_adapter else []
        words += [f"{head} tied to the embedding" for head in tied]
        return "; ".join([*words, *self.notes])

    @property
    def _whole_adapter(self) -> bool:
        return self.is_peft and not self.is_init_step

    def _prefixes(self) -> list[str]:
        return model_keys.part_prefixes(self.model)

    def _parts(self) -> list[tuple[str, nn.Module]]:
        return list(zip(self._prefixes(), self.model, strict=True))

    def _own(self, part: nn.Module) -> dict[str, Any]:
        """The entries of `part` that are saved and loaded, by canonical name."""
        tied = model_keys.tied_head(part)
        state = get_model_state_dict(part, options=StateDictOptions(cpu_offload=self.cpu_offload))
        return {
            name: value
            for name, value in state.items()
            if not (tied is not None and name == tied[0])
            and not (self.is_init_step and adapters.is_adapter(name))
            and not self._is_skipped(name)
        }

    def _is_skipped(self, key: str) -> bool:
        """Whether `key`, of this model or of a checkpoint, belongs to a head that is currently left out."""
        if not (self.is_init_step or self._is_initial) or not self.skip_task_head_prefixes:
            return False
        name = model_keys.without_wrappers(key.removeprefix(adapters.OUTER_PREFIX))
        return name.startswith(self.skip_task_head_prefixes)

    def _skipped_names(self) -> list[str]:
        """The names of the entries that are left out and stay as built. Collective with FSDP1."""
        if not (self.is_init_step or self._is_initial) or not self.skip_task_head_prefixes:
            return []
        if self._whole_adapter:
            names = list(adapters.stored_keys(self._parts()))
        else:
            tied = {pair[0] for part in self.model if (pair := model_keys.tied_head(part))}
            names = [name for part in self.model for name in get_model_state_dict(part) if name not in tied]
        return sorted(filter(self._is_skipped, names))

    def _substitutes(self, absent: set[str], present: set[str]) -> dict[str, str]:
        """Maps an absent head or embedding to the present key that has its values."""
        found: dict[str, str] = {}
        for prefix, part in self._parts():
            tied = model_keys.tied_head(part)
            _, head = model_keys.head_and_name(part)
            if tied is not None:
                pairs = [(tied[1], tied[0])]
            elif head is not None and not model_keys.declares_separate_head(part):
                pairs = [(head, name) for name in model_keys.embedding_names(part, head)]
            else:
                pairs = []
            for key, source in pairs:
                if prefix + key in absent and prefix + source in present:
                    found.setdefault(prefix + key, prefix + source)
        return found

    def _fill_in_heads(self, keys: set[str], given: dict[str, Any]) -> dict[str, str]:
        """Give absent heads the values of their embedding, even if that is in a different stage of the pipeline."""
        stages = self._gather(set(given))
        substitutes = self._substitutes(keys - given.keys(), set().union(*stages))
        wanted = self._gather({source for source in substitutes.values() if source not in given})
        # In the same order on all stages, computed from what all of them know: each iteration is a collective.
        for source in sorted(set().union(*wanted)):
            owner = next(index for index, stage in enumerate(stages) if source in stage)
            value = dense.from_stage(given.get(source), owner, self._pipeline())
            for key in [key for key, wants in substitutes.items() if wants == source and source not in given]:
                given[key] = value
        for key, source in substitutes.items():
            if source in given:
                given[key] = given[source]
        return substitutes

    def _gather(self, keys: set[str]) -> list[set[str]]:
        group = self._pipeline()
        if group is None:
            return [keys]
        into: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(into, keys, group=group)
        return into

    def _pipeline(self) -> dist.ProcessGroup | None:
        """The ranks of the pipeline, in a group that can send pickled objects from host memory."""
        return None if self.pp_group is None else on_host(self.pp_group)

    def _accept(self, missing: set[str], unexpected: set[str], strict: bool | None) -> None:
        judged = self._judge(missing, unexpected, strict)
        if judged.problems:
            raise ValueError(
                f"{len(judged.problems)} entries of the model do not fit; nothing was loaded:\n"
                + "\n".join(f"  {problem}" for problem in judged.problems)
            )
        self.notes = judged.notes
        for note in judged.notes:
            _log.warning("model: %s", note)

    def _judge(self, missing: Set[str], unexpected: Set[str], strict: bool | None) -> Reconciled:
        strict = (self.strict if strict is None else strict) and not self.is_init_step
        tied = {prefix + pair[0] for prefix, part in self._parts() if (pair := model_keys.tied_head(part))}
        notes: list[str] = []
        problems: list[str] = []
        for key in sorted(key for key in missing if not self._is_skipped(key)):
            fatal = strict and not dense.is_extra(key)
            (problems if fatal else notes).append(
                f"{key} is not in the checkpoint" + ("" if fatal else ": kept as built")
            )
        for key in sorted(unexpected):
            if self._is_skipped(key):
                notes.append(f"{key} is in the checkpoint: left out on request")
            elif model_keys.without_wrappers(key) in tied:
                notes.append(f"{key} is in the checkpoint, but tied to the embedding here: not loaded")
            else:
                fatal = strict and not dense.is_extra(key)
                (problems if fatal else notes).append(f"{key} is in the checkpoint, but not in the model")
        return Reconciled(problems=tuple(problems), notes=tuple(notes))
