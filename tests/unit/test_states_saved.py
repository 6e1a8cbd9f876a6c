"""What is saved of our own parts may have been written by anybody: it is looked at before anything is touched."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from ray_stateful import GlobalBatchSampler, LoaderState, OptimizerState, Progress, RandomState, checkpoint
from ray_stateful.errors import StateMismatch
from tests.part import Part

PARTS = {
    "batches": lambda: GlobalBatchSampler(100, global_batch_size=10, micro_batch_size=5),
    "progress": Progress,
    "random": RandomState,
}

CHANGES = {
    "a position that is a text": ("batches", ["position"], "x"),
    "a position before the first": ("batches", ["position"], -50),
    "a position beyond the last": ("batches", ["position"], 105),
    "samples of more than 64 bits": ("batches", ["samples"], 10**30),
    "samples of more digits than a float has": ("batches", ["samples"], 10**400),
    "a seed that is a text": ("batches", ["seed"], "x"),
    "a step that is true": ("progress", ["step"], True),
    "a time that is none": ("progress", ["wall_s"], math.nan),
    "a time too large for a float": ("progress", ["wall_s"], 10**400),
    "a choice that is an array": ("batches", ["drop_last"], np.zeros(2)),
    "a version of another Python": ("random", ["streams", "python", "version"], 7),
    "a position beyond NumPy's words": ("random", ["streams", "numpy", "state", "pos"], 625),
    "a position before NumPy's words": ("random", ["streams", "numpy", "state", "pos"], -1),
    "fewer bytes than torch's stream has": ("random", ["streams", "torch"], torch.zeros(3, dtype=torch.uint8)),
    "streams that are a list": ("random", ["streams"], []),
    "no streams": ("random", ["streams"], {}),
    "a stream whose name is a number": ("random", ["streams", 1], {}),
    "a number that is a text": ("random", ["streams", "python", "gauss"], "x"),
    "words that are pairs": ("random", ["streams", "python", "words"], torch.zeros(625, 2)),
    "a generator that is not NumPy's": ("random", ["streams", "numpy"], {"bit_generator": "none", "state": 5}),
    "a rank that is an array": ("random", ["data_parallel_rank"], np.zeros(2)),
    "a seed that is no number": ("random", ["seed"], None),
}


def changed(state: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    state = copy.deepcopy(state)
    inner = state
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return state


@pytest.mark.parametrize("case", CHANGES)
def test_what_no_part_of_ours_has_saved_is_said_before_it_is_loaded(case):
    name, path, value = CHANGES[case]
    part = PARTS[name]()
    assert part.check_saved(part.state_dict()) == ()
    assert part.check_saved(changed(part.state_dict(), path, value))


@pytest.mark.parametrize(
    "sched",
    [5, [1, 2], {"_schedulers": 5}, {"_schedulers": [1, 2]}, {"_last_lr": [None]}, {"_last_lr": ["x"]}],
    ids=str,
)
def test_a_state_of_no_scheduler_is_said_before_it_is_loaded(sched):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedules = [torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2)]
    part = OptimizerState(model, optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, schedules, [5]))
    saved = part.state_dict()
    assert part.check_saved(saved) == ()

    changes = {**saved["sched"], **sched} if isinstance(sched, dict) else sched

    assert part.check_saved({**saved, "sched": changes})


@pytest.mark.parametrize("name", PARTS)
def test_an_entry_that_is_missing_is_said_before_anything_is_loaded(name):
    part = PARTS[name]()
    assert part.check_saved([1, 2])
    for missing in set(part.state_dict()) - {"drop_last", "data_parallel_rank"}:  # not in earlier versions
        saved = part.state_dict()
        del saved[missing]
        assert part.check_saved(saved), missing


def test_what_is_said_of_an_entry_that_is_missing_is_what_the_restore_says(tmp_path):
    part = PARTS["batches"]()
    saved = {name: value for name, value in part.state_dict().items() if name != "length"}
    checkpoint.save({"batches": Part(saved)}, step=1, run=str(tmp_path))

    with pytest.raises(StateMismatch, match=r"batches: length is a NoneType in the checkpoint"):
        checkpoint.restore({"batches": part}, run=str(tmp_path))


def test_a_loader_without_a_state_is_said_before_it_is_loaded():
    class Loader:
        def state_dict(self):
            return {"position": 3}

        def load_state_dict(self, state):
            raise AssertionError("is not asked")

    part = LoaderState(Loader())
    saved = part.state_dict()

    assert part.check_saved(saved) == part.check_resized({0: saved, 1: saved}) == ()
    for other in ({}, 5, {"position": 3}):
        assert part.check_saved(other)
        assert len(part.check_resized({0: saved, 1: other, 2: other})) == 1


def test_counts_of_numpy_are_counts_and_so_are_those_that_earlier_versions_saved():
    progress = Progress()
    progress.count(samples=np.int64(3), tokens=7.0)
    assert type(progress.state_dict()["samples"]) is type(progress.state_dict()["tokens"]) is int
    with pytest.raises(ValueError, match="no whole number"):
        progress.count(tokens=0.5)
    for name, make in PARTS.items():
        part = make()
        saved = {
            key: np.int64(value) if type(value) is int and name != "random" else value
            for key, value in part.state_dict().items()
        }
        saved["seed"] = np.int64(5)
        assert part.check_saved(saved) == ()
        part.load_state_dict(saved)
        assert not [value for value in part.state_dict().values() if isinstance(value, np.integer)]
    assert RandomState(seed=np.int64(5)).state_dict()["seed"] == 5


def test_numpys_stream_is_not_put_where_it_would_read_beyond_its_words():
    part = RandomState()
    with pytest.raises(StateMismatch, match="position 625 of 624"):
        part.load_state_dict(changed(part.state_dict(), ["streams", "numpy", "state", "pos"], 625))
    part = RandomState({"mine": np.random.Generator(np.random.Philox(1))})
    with pytest.raises(StateMismatch, match="position 5 of 4"):
        part.load_state_dict(changed(part.state_dict(), ["streams", "generator mine", "buffer_pos"], 5))
