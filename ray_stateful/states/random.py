"""The random streams of one rank: exact on the number of workers that saved them, derived on any other.

Each rank has streams of its own (dropout, augmentation), so they are saved per rank. With more ranks than were saved, a
fifth worker has no stream to go on with, and a copy of another worker's would give the two the same dropout.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any, Protocol

import numpy as np
import torch

from ray_stateful.errors import StateMismatch
from ray_stateful.ranks import current_rank
from ray_stateful.states.counts import is_whole
from ray_stateful.states.derived import derived_seed
from ray_stateful.states.part import RankPart, World

Generator = torch.Generator | np.random.Generator | random.Random


class _Stream(Protocol):
    def get(self) -> Any: ...
    def set(self, state: Any) -> None: ...
    def try_out(self, state: Any) -> None: ...
    def reseed(self, seed: int) -> None: ...


class RandomState(RankPart):
    """Python's `random`, NumPy's global stream, torch's CPU and CUDA streams, and generators that you name.

    On a different number of workers every stream restarts at `derived_seed("random", seed, step, rank, stream)`, 63
    bits of a SHA-256: the same for the same resume, different for every rank, stream and step.

    Args:
        generators: More streams, by name. They must be the same names when resuming, on any number of workers. How many
            children a NumPy generator has spawned is not in its state: spawn them before the restore, and name them.
        seed: What derived streams come from; the same on every rank. A resumed run keeps the checkpoint's. Default: the
            seed that rank 0's torch stream was given.
        devices: CUDA devices that this rank draws on; the same number of them when resuming on the same number of
            workers. Default: the current device, if CUDA is in use.
        data_parallel_rank: The rank for which streams are derived here on a different number of workers. Default: the
            global rank, so that all ranks draw differently. Ranks of one tensor-parallel group have to draw alike:
            DTensor's dropout takes their CUDA streams to be the same (`torch.distributed.tensor._random`). On the same
            number of workers it has to equal the saved one: on a different mesh, ranks of one group would go on with
            different streams.
    """

    # Loading other parts may draw from these streams.
    loads_last = True
    resized_as = "re-seeded"

    def __init__(
        self,
        generators: Mapping[str, Generator] | None = None,
        *,
        seed: int | None = None,
        devices: Sequence[torch.device | int] | None = None,
        data_parallel_rank: int | None = None,
    ) -> None:
        self._named = {name: _named(name, generator) for name, generator in (generators or {}).items()}
        self._seed = None if seed is None else index(seed)
        self._devices = None if devices is None else list(devices)
        self._data_parallel_rank = data_parallel_rank

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": torch.initial_seed() if self._seed is None else self._seed,
            "data_parallel_rank": self._rank(current_rank()),
            "streams": {name: stream.get() for name, stream in self._streams().items()},
        }

    def check_saved(self, saved: Mapping[str, Any]) -> tuple[str, ...]:
        """What keeps `saved` from being loaded at equal size, one line each; changes nothing."""
        wrong = self._malformed(saved)
        if wrong:
            return wrong
        problems = [*self.check_resized({0: saved})]
        # Checkpoints of earlier versions lack it. The line names no ranks, so that it is the same on all of them.
        data_parallel_rank = saved.get("data_parallel_rank", self._rank(current_rank()))
        if not is_whole(data_parallel_rank) or data_parallel_rank != self._rank(current_rank()):
            problems.append(
                "data_parallel_rank is another one than was saved on this rank, so that ranks of one group would draw "
                "differently: resume on the mesh that saved, or leave this part out of one restore and save it anew"
            )
        if self._devices is not None:
            missing, new = self._cuda_differences(saved)
            found = [f"{name} is in" for name in missing] + [f"{name} is not in" for name in new]
            problems += [f"{one} the checkpoint: give as many devices= as saved it, or leave it out" for one in found]
        return tuple(problems)

    def check_resized(self, saved: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
        """What keeps `saved` from being loaded on a different number of ranks, one line each; changes nothing."""
        if not _has_streams(saved[0]):
            return (_NOT_OURS,)
        ours = {f"generator {name}" for name in self._named}
        theirs = {name for name in saved[0]["streams"] if name.startswith("generator ")}
        return tuple(
            [f"{name} is not in the checkpoint: leave it out of generators=" for name in sorted(ours - theirs)]
            + [f"{name} is in the checkpoint: give it in generators=" for name in sorted(theirs - ours)]
        )

    def changed_from(self, saved: Mapping[str, Any]) -> tuple[str, ...]:
        """What will not be as it was saved, in a few words each; changes nothing."""
        # Not a reason to refuse: the user does not decide whether CUDA is in use at a restore.
        missing, new = self._cuda_differences(saved)
        return (
            *(f"stream {name} is left out: not drawn on here" for name in missing),
            *(f"stream {name} is as it was seeded: not in the checkpoint" for name in new),
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on with every stream exactly where it was.

        Raises:
            StateMismatch: named generators, `devices` or `data_parallel_rank` differ from the saved ones, or a saved
                stream is malformed.
        """
        problems = self.check_saved(state_dict)
        streams = {} if problems else self._streams(state_dict)
        # Not in `check_saved`, which is asked before tensors are read.
        problems += tuple(
            f"stream {name} has more words left than there are: it is not one of ours"
            for name, stream in streams.items()
            if isinstance(stream, _Torch) and not stream.has_words(state_dict["streams"].get(name, stream.get()))
        )
        if problems:
            raise StateMismatch("of the random streams", problems)
        for name, state in state_dict["streams"].items():
            if name in streams:
                streams[name].set(state)
        self._seed = int(state_dict["seed"])

    def check_resize(self, name: str, world: World) -> None:
        """Any number of ranks will do."""

    def resize(self, saved: Mapping[int, Mapping[str, Any]], world: World) -> str:
        self._seed = int(saved[0]["seed"])
        rank = self._rank(world.rank)
        for name, stream in self._streams(saved[0]).items():
            stream.reseed(derived_seed("random", self._seed, world.step, rank, name))
        streams = f"{len(saved)} stream{'' if len(saved) == 1 else 's'}"
        workers = f"{world.world_size} worker{'' if world.world_size == 1 else 's'}"
        return f"{streams} saved, {workers}: derived from (seed {self._seed}, step {world.step}, rank)"

    def _streams(self, saved: Mapping[str, Any] | None = None) -> dict[str, _Stream]:
        streams: dict[str, _Stream] = {
            "python": _Python(random._inst),  # what the functions of the module draw from
            "numpy": _NumpyGlobal(),
            "torch": _Torch(torch.default_generator),
        }
        for position, device in enumerate(self._cuda_devices(saved)):
            # By position: a rank that was placed elsewhere has its stream on a device with a different number.
            torch.cuda.init()  # type: ignore[no-untyped-call]  # untyped in torch
            streams[f"cuda {position}"] = _Torch(torch.cuda.default_generators[device])
        return streams | {f"generator {name}": stream for name, stream in self._named.items()}

    def _malformed(self, saved: Mapping[str, Any]) -> tuple[str, ...]:
        if not _has_streams(saved):
            return (_NOT_OURS,)
        found = []
        for name, stream in self._streams(saved).items():
            try:
                if name in saved["streams"]:
                    stream.try_out(saved["streams"][name])
            # What Python, NumPy and torch raise for values of other kinds.
            except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                found.append(f"stream {name} has no state that it could go on from: {type(error).__name__}: {error}")
        return tuple(found)

    def _rank(self, rank: int) -> int:
        return rank if self._data_parallel_rank is None else self._data_parallel_rank

    def _cuda_differences(self, saved: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """The CUDA streams that are only in `saved`, and those that are only here."""
        ours = {f"cuda {position}" for position in range(len(self._cuda_devices(saved)))}
        theirs = {name for name in saved["streams"] if name.startswith("cuda ")}
        return sorted(theirs - ours), sorted(ours - theirs)

    def _cuda_devices(self, saved: Mapping[str, Any] | None) -> list[int]:
        if not torch.cuda.is_available():
            return []
        if self._devices is not None:
            return [d if isinstance(d, int) else torch.cuda._utils._get_device_index(d, True) for d in self._devices]
        # CUDA is not asked before it is in use: that would take memory on a device that this rank never touches.
        in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # untyped in torch
        wanted = saved is not None and "cuda 0" in saved["streams"]
        return [torch.cuda.current_device()] if in_use or wanted else []


def _has_streams(saved: Mapping[str, Any]) -> bool:
    streams = saved.get("streams") if isinstance(saved, Mapping) and is_whole(saved.get("seed")) else None
    # The streams that every process has.
    return isinstance(streams, Mapping) and {"python", "numpy", "torch"} <= streams.keys() <= set(map(str, streams))


_NOT_OURS = "no seed and streams are in the checkpoint: it is not one of ours"


# How the state of a generator on the CPU begins: its seed, the words left, whether it was seeded, and its position.
_TORCH_HEAD = struct.Struct("<QiiQ")


class _Python:
    def __init__(self, generator: random.Random) -> None:
        self._generator = generator

    def get(self) -> Any:
        version, words, gauss = self._generator.getstate()
        return {"version": version, "words": np.array(words, dtype=np.uint32), "gauss": gauss}

    def set(self, state: Any) -> None:
        _set_python(self._generator, state)

    def try_out(self, state: Any) -> None:
        _set_python(random.Random(), state)  # noqa: S311 - nothing is drawn from it

    def reseed(self, seed: int) -> None:
        self._generator.seed(seed)


class _NumpyGlobal:
    def get(self) -> Any:
        return np.random.get_state(legacy=False)

    def set(self, state: Any) -> None:
        np.random.set_state(state)

    def try_out(self, state: Any) -> None:
        if state["bit_generator"] == "MT19937":  # unless a different one was set
            np.random.RandomState(np.random.MT19937()).set_state(state)
        _check_positions(state)

    def reseed(self, seed: int) -> None:
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])


class _Numpy:
    def __init__(self, generator: np.random.Generator) -> None:
        self._bits = generator.bit_generator

    def get(self) -> Any:
        return self._bits.state

    def set(self, state: Any) -> None:
        self._bits.state = state

    def try_out(self, state: Any) -> None:
        type(self._bits)().state = state
        _check_positions(state)

    def reseed(self, seed: int) -> None:
        self._bits.state = type(self._bits)(seed).state


class _Torch:
    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def get(self) -> Any:
        return self._generator.get_state()

    def set(self, state: Any) -> None:
        self._generator.set_state(state.cpu())

    def has_words(self, state: torch.Tensor) -> bool:
        """Whether as many words follow the position as are said to be left. torch reads past them if they do not."""
        if self._generator.device.type != "cpu":
            return True
        _, left, _, position = _TORCH_HEAD.unpack(bytes(state[: _TORCH_HEAD.size].tolist()))
        # With one word left, the next draw makes new ones first.
        return bool(left == 1 or left + position <= 625)

    def try_out(self, state: Any) -> None:
        # Only dtype and size can be checked: the bytes of `state` are not read yet.
        size = self._generator.get_state().numel()
        if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8 or state.numel() != size:
            raise ValueError(f"not {size:,} bytes")

    def reseed(self, seed: int) -> None:
        self._generator.manual_seed(seed)


def _set_python(generator: random.Random, state: Any) -> None:
    if not isinstance(state["gauss"], float | None):  # Python keeps anything, and fails at the next `gauss`
        raise TypeError(f"gauss is a {type(state['gauss']).__name__}")
    generator.setstate((state["version"], tuple(int(word) for word in state["words"]), state["gauss"]))


def _check_positions(state: Any) -> None:
    """Refuse a position beyond the words that are drawn from: NumPy does not, and would read past them."""
    for found, words in ((state["state"].get("pos", 0), 624), (state.get("buffer_pos", 0), 4)):
        if type(found) is not int or not 0 <= found <= words:
            raise ValueError(f"position {found!r} of {words} words")


def _named(name: str, generator: Generator) -> _Stream:
    if isinstance(generator, torch.Generator):
        return _Torch(generator)
    if isinstance(generator, np.random.Generator):
        return _Numpy(generator)
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):
        return _Python(generator)
    raise ValueError(
        f"generator {name!r} is a {type(generator).__name__}, which has no state to save: "
        "give a torch.Generator, a numpy.random.Generator or a random.Random"
    )
