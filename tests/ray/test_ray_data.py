"""A Ray dataset that is gone on with in mid-epoch, by another number of workers: every row once."""

from __future__ import annotations

import functools
import json
import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import ray
import ray.data
import ray.train
import torch
from ray.data import ExecutionOptions, ExecutionResources, RandomSeedConfig
from ray.train.torch import TorchTrainer

from ray_stateful import checkpoint
from ray_stateful.checkpointer import Checkpointer
from ray_stateful.errors import StateMismatch
from ray_stateful.ray_data import RayDataBatches, ResumableDataConfig
from ray_stateful.ray_shards import refuse_positional, without
from ray_stateful.states.row_sets import RowSet, as_ids

# Blocks of 29 rows: neither a batch nor a worker's share ends where one of them does.
NUM_ROWS, NUM_BLOCKS, GLOBAL_BATCH, NUM_EPOCHS = 203, 7, 16, 3
SAVE_EVERY = 4
# What each group of workers went on after, how many they are, and the step in which one of them is killed.
GROUPS = [(0, 2, 7), (4, 2, 11), (8, 3, None)]

# A task that runs beside another has to start a process first.
ONE_AT_A_TIME = ExecutionOptions(resource_limits=ExecutionResources(cpu=1))


def _train(config):
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with pytest.raises(ValueError, match="leaves some of"):
        RayDataBatches(global_batch_size=1, micro_batch_size=3)
    batches = RayDataBatches(
        global_batch_size=GLOBAL_BATCH, micro_batch_size=3, local_shuffle_buffer_size=20, local_shuffle_seed=1
    )
    with Checkpointer({"batches": batches}, every_n_steps=SAVE_EVERY, at_end=False) as checkpointer:
        report = checkpointer.restore()
        began = checkpointer.step_count
        log = Path(config["tmp_path"], f"log.{began}.{world_size}.{rank}")
        killed_at = {(began, world_size): step for began, world_size, step in GROUPS}[began, world_size]

        def say(**what):
            with log.open("a") as file:
                file.write(json.dumps(what) + "\n")

        with pytest.raises(RuntimeError, match="no batch in hand"):
            batches.on_step(step=1)
        say(position=batches.position, report=str(report), changed=None if report is None else _changed())
        while batches.epoch < NUM_EPOCHS:
            for batch in batches:
                ids, weight = [], 0.0
                for micro in batch:
                    assert (micro.data["double"] == 2 * micro.data["id"]).all()
                    assert 1 <= len(micro.data["id"]) <= 3
                    weight += len(micro.data["id"]) * micro.loss_scale
                    ids += [] if micro.is_padding else micro.data["id"].tolist()
                say(
                    step=checkpointer.step_count + 1,
                    epoch=batch.epoch,
                    ids=ids,
                    weight=weight,
                    num_samples=batch.num_samples,
                    num_micro=len(batch),
                )
                if killed_at == checkpointer.step_count + 1 and rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                checkpointer.step()
        assert batches.samples == NUM_EPOCHS * NUM_ROWS


def _changed():
    """What is said of another global batch: the problem, and the line of the report if it is allowed."""
    of = {"global_batch_size": 2 * GLOBAL_BATCH, "micro_batch_size": 3}
    with pytest.raises(StateMismatch) as refused:
        checkpoint.restore({"batches": RayDataBatches(**of)})
    allowed = RayDataBatches(**of, allow_change=["global_batch_size"])
    return str(refused.value), str(checkpoint.restore({"batches": allowed}))


def _read(tmp_path, began, world_size):
    logs = [tmp_path / f"log.{began}.{world_size}.{rank}" for rank in range(world_size)]
    return [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]


def _double(rows):
    return {**rows, "double": 2 * rows["id"]}


def test_a_run_killed_in_mid_epoch_goes_on_with_more_workers_the_same_batch_and_every_row_once(cluster, fit, tmp_path):
    # Rows are shuffled without a seed: what tells them apart is their id, not their place.
    dataset = ray.data.range(NUM_ROWS, override_num_blocks=NUM_BLOCKS).randomize_block_order().map_batches(_double)
    config = ResumableDataConfig(row_id="id", execution_options=ONE_AT_A_TIME)
    trainer = functools.partial(TorchTrainer, datasets={"train": dataset}, dataset_config=config)
    with pytest.raises(ray.train.WorkerGroupError):
        fit(_train, num_workers=2, trainer=trainer, failure_config=ray.train.FailureConfig(max_failures=1))
    fit(_train, num_workers=3, trainer=trainer)

    survived = []
    for began, world_size, killed_at in GROUPS:
        logs = _read(tmp_path, began, world_size)
        assert {log[0]["position"] for log in logs} == {began * GLOBAL_BATCH}
        for lines in zip(*(log[1:] for log in logs), strict=False):
            # All ranks ran as many micro-batches, and the weights of their rows make a mean over them.
            assert len({(line["step"], line["num_micro"], line["num_samples"]) for line in lines}) == 1
            assert sum(len(line["ids"]) for line in lines) == lines[0]["num_samples"] <= GLOBAL_BATCH
            assert sum(line["weight"] for line in lines) == pytest.approx(world_size)
        lines = [line for log in logs for line in log[1:]]
        # There was something to lose: steps that were trained after the last save, and again by the next group.
        assert killed_at is None or max(line["step"] for line in lines) == killed_at
        survived += [line for line in lines if killed_at is None or line["step"] <= began + SAVE_EVERY]
    assert "exact" in _read(tmp_path, 4, 2)[0][0]["report"]
    assert "re-planned" in logs[0][0]["report"]
    for began, world_size, outcome in [(4, 2, "changed"), (8, 3, "re-planned")]:
        refused, allowed = _read(tmp_path, began, world_size)[0][0]["changed"]
        assert "batches: global_batch_size was 16 and is 32" in refused
        assert outcome in allowed
        assert "global_batch_size 16 -> 32" in allowed

    for epoch in range(NUM_EPOCHS):
        seen = Counter(row for line in survived if line["epoch"] == epoch for row in line["ids"])
        assert seen == Counter(range(NUM_ROWS))


def test_ray_itself_drops_the_rows_that_do_not_divide(cluster):
    """Why the split is not Ray Train's own."""

    def read(split):
        return sum(len(rows["id"]) for rows in split.iter_batches(batch_size=None))

    def all_rows(equal):
        splits = ray.data.range(10, override_num_blocks=2).streaming_split(3, equal=equal)
        with ThreadPoolExecutor(3) as readers:
            return sum(readers.map(read, splits))

    assert all_rows(equal=True) == 9
    assert all_rows(equal=False) == 10


def test_rows_are_left_out_by_hashes_too_and_a_block_without_columns_stays():
    hashes = np.array([0, 7, 2**63, 2**64 - 1, 8], np.uint64)
    table = pyarrow.table({"x": range(5), "row_hash": hashes})
    trained = RowSet.of(as_ids(hashes[[0, 3, 4]]))

    assert without(table, row_id="row_hash", trained=trained)["x"].to_pylist() == [1, 2]
    assert without(pyarrow.table({}), row_id="row_hash", trained=trained).num_rows == 0
    with pytest.raises(ValueError, match="column 'x': the row ids are float64"):
        without(pyarrow.table({"x": [0.5]}), row_id="x", trained=trained)


def _in_order():
    dataset = ray.data.range(20)
    dataset.context.execution_options = ExecutionOptions(preserve_order=True)
    return dataset


# What Ray has deprecated for the reason that is tested here.
@pytest.mark.filterwarnings(r"ignore:[\s\S]*`Dataset.zip` is deprecated")
def test_a_dataset_that_chooses_rows_by_an_order_that_changes_is_refused(cluster):
    numbers = ray.data.range(20)
    again = RandomSeedConfig(seed=1, reseed_after_execution=False)

    for dataset in (numbers.random_shuffle(), _in_order().limit(5), _in_order().random_shuffle(seed=again).limit(5)):
        refuse_positional("train", dataset)
    with pytest.raises(ValueError, match=r"'train' has Limit.*preserve_order=True"):
        refuse_positional("train", numbers.limit(5))
    with pytest.raises(ValueError, match="has Zip"):
        refuse_positional("train", numbers.zip(ray.data.range(20)))
    for seed in (None, RandomSeedConfig(seed=1)):
        with pytest.raises(ValueError, match="RandomShuffle gives a different order at each execution") as refused:
            refuse_positional("train", _in_order().random_shuffle(seed=seed).limit(5))
        assert "as tasks finish" not in str(refused.value)


# Ray sets the option itself that it has deprecated.
@pytest.mark.filterwarnings("ignore:`ExecutionOptions.exclude_resources` is deprecated")
def test_datasets_that_are_not_named_are_as_without_us(cluster):
    config = ResumableDataConfig(row_id="id", resumable=["train"])
    node = ray.get_runtime_context().get_node_id()
    datasets = {"train": ray.data.range(10), "valid": ray.data.range(10)}
    shards = config.configure(datasets, 2, None, [node, node])

    assert [sorted(shard) for shard in shards] == [["train", "valid"]] * 2
    assert [shard["train"].dataset is None for shard in shards] == [False, True]
    assert [isinstance(shard["valid"], ray.data.DataIterator) for shard in shards] == [True, True]


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "x"},
        {"epoch": -1},
        {"samples": None},
        {"global_batch_size": "x"},
        {"first": 5},
        {"last": torch.zeros(3)},
        {"last": torch.zeros(3, dtype=torch.int64)},
        {"first": torch.zeros(2, 1, dtype=torch.int64)},
    ],
    ids=str,
)
def test_what_no_batches_of_ours_have_saved_is_said_before_it_is_loaded(changes):
    batches = object.__new__(RayDataBatches)  # to make one takes a worker
    batches.global_batch_size, batches._allow_change = 16, frozenset()
    rows = torch.zeros(2, dtype=torch.int64)
    saved = {"epoch": 0, "position": 8, "samples": 8, "global_batch_size": 16, "first": rows, "last": rows}
    earlier = {name: value for name, value in saved.items() if name != "global_batch_size"}
    assert batches.check_saved(saved) == batches.check_saved(earlier) == batches.check_resized({0: saved}) == ()

    assert batches.check_saved({**saved, **changes})
    assert batches.check_resized({0: saved, 1: {**saved, **changes}})
    assert batches.check_saved([1, 2])


def test_a_name_instead_of_names_is_refused():
    with pytest.raises(ValueError, match=r"\['train'\]"):
        ResumableDataConfig(row_id="id", resumable="train")
