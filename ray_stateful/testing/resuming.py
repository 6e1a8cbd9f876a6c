"""Does a training loop resume? Training on, and restoring before training on, must end in the same bits.

What a state forgets shows in two places: right after the restore, if a part does not give back what it was given; or
some steps later, if something that training depends on is in no part at all (a random stream, the position in the
data, a learning rate that is computed from a counter elsewhere).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from ray_stateful.checkpoint import restore, save
from ray_stateful.ranks import Ranks
from ray_stateful.runs import Run

Build = Callable[[], tuple[Mapping[str, Any], Callable[[], Any]]]


def assert_resumes(
    build: Build,
    *,
    num_steps: int = 3,
    num_more: int = 3,
    ignore: Collection[str] = (),
    run: Run | str | None = None,
    timeout_s: float = 60.0,
) -> None:
    """Assert that a run that was saved and resumed goes on, bit for bit, like one that was never stopped.

    Trains `num_steps`, saves, trains `num_more`. Then builds everything anew, restores, and trains `num_more`. Compares
    the state right after the restore with the one that was saved, what every further step returned, and the states at
    the end; floating point numbers by their bits. Parts with an `on_step` are told of each step, as by
    `Checkpointer.step`.

    ```python
    def build():
        torch.manual_seed(0)
        model = Model()
        optimizer = torch.optim.AdamW(model.parameters())
        batches = GlobalBatchSampler(1000, global_batch_size=16, micro_batch_size=4, seed=0)
        ...
        state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer), "batches": batches}
        return state, train_one_step          # takes nothing; what it returns, a loss for example, is compared too

    def test_training_resumes():
        assert_resumes(build)
    ```

    Collective where `torch.distributed` is set up (`run_ranks` does): every rank calls it, and every rank raises.

    Args:
        build: Makes the state and the function of one training step, all new: it is called twice. It may draw from
            random streams; that the second call finds them at a different position is part of the test.
        num_steps: Steps before the save.
        num_more: Steps after it, in both runs.
        ignore: Keys of the state that need not be the same, such as "progress.wall_s", and with them all keys below.
        run: Where to save: a directory or URI that the ranks share, with no checkpoints yet. By default a temporary
            directory of this machine.
        timeout_s: How long a rank waits for the others in any one step of saving and restoring.

    Raises:
        AssertionError: names the first part and key, or the step, that differs, with what was expected and found.
        ValueError: both calls of `build` gave the same object as a part, so that nothing would be tested.
    """
    ranks = Ranks.of_world(timeout_s)
    with ExitStack() as stack:
        if run is None:
            mine = stack.enter_context(tempfile.TemporaryDirectory(prefix="assert_resumes_")) if not ranks.rank else ""
            run = ranks.broadcast("share a directory", mine)

        state, step = build()
        for number in range(num_steps):
            _trained(state, step, number)
        saved = _snapshot(state)
        save(state, step=num_steps, run=run, timeout_s=timeout_s)
        more = range(num_steps, num_steps + num_more)
        expected_results = [_trained(state, step, number) for number in more]
        expected = _snapshot(state)

        fresh, fresh_step = build()
        for name in sorted(state.keys() & fresh.keys()):
            if fresh[name] is state[name]:
                raise ValueError(f"build() gave the same {name!r} twice: build every part anew")
        report = restore(fresh, run=run, timeout_s=timeout_s)
        # A barrier: rank 0 must keep the directory until every rank has read it.
        ranks.all_gather_ints("restore", [0 if report is None else report.step])
        found = _snapshot(fresh)
        _agree(ranks, "right after the restore", saved, found, ignore)
        for number, expected_result in zip(more, expected_results, strict=True):
            result = _trained(fresh, fresh_step, number)
            _agree(ranks, f"in what step {number + 1} returned", expected_result, result, ())
        when = f"{num_more} steps after the restore"
        _agree(ranks, when, expected, _snapshot(fresh), ignore)


def first_difference(expected: Any, found: Any, key: str = "", ignore: Collection[str] = ()) -> str | None:
    """Where two values differ first, and how, in one line; `None` if they are equal bit for bit and type for type."""
    if key in ignore:
        return None
    where = key or "the value"
    if type(expected) is not type(found):
        return f"{where}: expected {_short(expected)}, found {_short(found)}"
    if isinstance(expected, Mapping):
        for name in sorted(expected.keys() ^ found.keys(), key=repr):
            below = _join(key, name)
            if below not in ignore:
                return f"{below}: {'not restored' if name in expected else 'was not there before'}"
        return _first(
            first_difference(expected[name], found[name], _join(key, name), ignore)
            for name in sorted(expected, key=repr)
        )
    if isinstance(expected, list | tuple):
        if len(expected) != len(found):
            return f"{where}: expected {len(expected)} entries, found {len(found)}"
        return _first(
            first_difference(one, other, _join(key, number), ignore)
            for number, (one, other) in enumerate(zip(expected, found, strict=True))
        )
    if isinstance(expected, torch.Tensor):
        return _tensor_difference(where, expected, found)
    if isinstance(expected, np.ndarray | np.generic):
        same = (expected.dtype, expected.shape, expected.tobytes()) == (found.dtype, found.shape, found.tobytes())
    elif isinstance(expected, float):
        # By its text, which is exact: NaN is not equal to itself, and zero equals minus zero.
        same = repr(expected) == repr(found)
    else:
        same = bool(expected == found)
    return None if same else f"{where}: expected {_short(expected)}, found {_short(found)}"


def _tensor_difference(where: str, expected: torch.Tensor, found: torch.Tensor) -> str | None:
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return f"{where}: expected {_short(expected)}, found {_short(found)}"
    if not expected.numel():
        return None
    # By its bytes: NaN is not equal to itself, and zero equals minus zero.
    ours, theirs = (tensor.reshape(-1).view(torch.uint8).view(tensor.numel(), -1) for tensor in (expected, found))
    different = (ours != theirs).any(dim=1).nonzero().flatten()
    if not len(different):
        return None
    at = int(different[0])
    values = f"expected {expected.flatten()[at].item()!r}, found {found.flatten()[at].item()!r}"
    return f"{where}: {len(different):,} of {expected.numel():,} elements differ, first number {at}: {values}"


def _trained(state: Mapping[str, Any], step: Callable[[], Any], number: int) -> Any:
    """Train step `number`, tell the parts that count steps, as `Checkpointer.step` does; return the step's result."""
    result = _copied(step())
    for name in sorted(state):
        on_step = getattr(state[name], "on_step", None)
        if on_step is not None:
            on_step(step=number + 1)
    return result


def _agree(ranks: Ranks, when: str, expected: Any, found: Any, ignore: Collection[str]) -> None:
    everyone = ranks.all_gather("compare", first_difference(expected, found, ignore=ignore))
    differences = {rank: difference for rank, difference in enumerate(everyone) if difference is not None}
    if differences:
        raise AssertionError(f"the resumed run differs {when}:\n{_lines(differences, ranks.world_size)}")


def _lines(differences: Mapping[int, str], world_size: int) -> str:
    return "\n".join(f"  rank {rank}: {what}" if world_size > 1 else f"  {what}" for rank, what in differences.items())


def _snapshot(state: Mapping[str, Any]) -> dict[str, Any]:
    """What every part holds on this rank, asked in the order in which a save does, as some parts call collectives."""
    return {name: _copied(state[name].state_dict()) for name in sorted(state)}


def _copied(value: Any) -> Any:
    """A copy that training does not change; of a sharded tensor, the shard."""
    if isinstance(value, DTensor):
        value = value.to_local()
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if isinstance(value, tuple):
        return tuple(_copied(item) for item in value)
    shards = getattr(value, "local_shards", None)
    if callable(shards):
        pieces: Any = shards()
        return [(list(piece.metadata.shard_offsets), _copied(piece.tensor)) for piece in pieces]
    return copy.deepcopy(value)


def _first(differences: Iterator[str | None]) -> str | None:
    return next((difference for difference in differences if difference is not None), None)


def _join(key: str, step: object) -> str:
    return f"{key}.{step}" if key else str(step)


def _short(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
