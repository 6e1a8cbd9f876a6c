"""Ray Data that resumes in mid-epoch, on any number of workers: rows have ids, and count once they are trained.

`ResumableDataConfig` is for the trainer, `RayDataBatches` for the training function:

```python
def train_func(config):
    batches = RayDataBatches("train", global_batch_size=512, micro_batch_size=8)
    state = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer), "batches": batches}
    with Checkpointer(state, every_n_steps=200) as checkpointer:
        checkpointer.restore()
        while batches.epoch < config["num_epochs"]:
            for batch in batches:                          # what is left of this epoch
                for micro in accumulate(model, batch):
                    (loss_fn(model, micro.data).sum() * micro.loss_scale).backward()
                optimizer.step(); optimizer.zero_grad()
                checkpointer.step()

TorchTrainer(train_func, datasets={"train": ds}, dataset_config=ResumableDataConfig(row_id="id"), ...)
```

Ray Data has no position to go back to: blocks come in the order in which tasks finish, and workers get what is ready.
So the state is not a position but the set of the row ids trained in this epoch; a resumed epoch reads the dataset again
and leaves those rows out. What this requires of the dataset is in `docs/design/ray_data.md`.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import ray.train
import torch
from numpy.typing import NDArray
from ray import cloudpickle
from ray.data import DataIterator

from ray_stateful.ranks import DEFAULT_TIMEOUT_S, Outcome, Ranks
from ray_stateful.ray_shards import ResumableDataConfig, ResumableShard, ids_of
from ray_stateful.states.counts import count_problems
from ray_stateful.states.part import RankPart, World, problems_of_all
from ray_stateful.states.row_sets import RowSet
from ray_stateful.states.shares import split_evenly

__all__ = ["RayDataBatches", "ResumableDataConfig", "RowBatch", "RowMicroBatch"]

Columns = Mapping[str, NDArray[Any]]

# The ids of this many steps are kept separately before they are merged into the set.
_MERGE_EVERY = 256


@dataclass(frozen=True, slots=True)
class RowMicroBatch:
    """What one forward and backward pass takes: `data` has the columns by name, with an entry per row, at least one.

    `loss_scale` and `is_padding` mean what they do in `ray_stateful.states.shares.MicroBatch`.
    """

    data: Columns
    loss_scale: float
    is_padding: bool = False


@dataclass(frozen=True, slots=True)
class RowBatch:
    """This worker's share of one global batch. `num_samples` and `len()` are the same on every rank."""

    epoch: int
    num_samples: int
    micro_batches: tuple[RowMicroBatch, ...]

    def __iter__(self) -> Iterator[RowMicroBatch]:
        return iter(self.micro_batches)

    def __len__(self) -> int:
        return len(self.micro_batches)


class RayDataBatches(RankPart):
    """The global batches of a Ray dataset, each row once per epoch, whatever happens to the workers meanwhile.

    Every rank constructs it, at the same point of the training function of a TorchTrainer that has a
    `ResumableDataConfig`. Iterating gives the rest of the epoch, and is collective: all ranks get the same number of
    batches, each with the same number of micro-batches on every rank. A rank whose rows have run out takes part with
    padding, so the last batches of an epoch may be smaller than `global_batch_size`; they are weighted as such.

    Which rows meet in a batch depends on the number of workers and on which of them were faster; for an order that
    does not, use `GlobalBatchSampler`.

    Args:
        dataset: Its name in the trainer's `datasets`.
        global_batch_size: Rows per optimizer step, over all workers; at least one for each.
        micro_batch_size: Rows per forward pass of one worker, at most.
        prefetch_batches, local_shuffle_buffer_size: As for Ray Data's `iter_batches`. Rows that were fetched but not
            trained do not count.
        local_shuffle_seed: Mixed with epoch and rank.
        allow_change: What may differ from the checkpoint: `"global_batch_size"`. The new one applies from the restore
            on, while schedulers keep counting steps.

    Attributes:
        epoch: From 0.
        position: Rows trained in this epoch, by all workers.
        samples: Rows trained in all epochs, by all workers.
    """

    resized_as = "re-planned"

    def __init__(
        self,
        dataset: str = "train",
        *,
        global_batch_size: int,
        micro_batch_size: int,
        prefetch_batches: int = 1,
        local_shuffle_buffer_size: int | None = None,
        local_shuffle_seed: int | None = None,
        allow_change: Collection[Literal["global_batch_size"]] = (),
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self._ranks = Ranks.of_world(timeout_s, "ray data")
        world_size = ray.train.get_context().get_world_size()
        if world_size != self._ranks.world_size:
            raise RuntimeError(
                f"Ray Train has {world_size} workers, and torch.distributed {self._ranks.world_size}: batches are "
                "agreed on by collectives, so use a TorchTrainer"
            )
        unknown = sorted(set(allow_change) - {"global_batch_size"})
        if unknown:
            raise ValueError(f"allow_change={unknown} names nothing that could change: global_batch_size")
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={micro_batch_size} leaves nothing to train on: give at least 1")
        if global_batch_size < world_size:
            # Ray would hand such a worker rows all the same, and nobody would train them.
            raise ValueError(f"global_batch_size={global_batch_size} leaves some of {world_size} workers without rows")
        shard = ray.train.get_dataset_shard(dataset)
        if not isinstance(shard, ResumableShard):
            raise ValueError(
                f"dataset {dataset!r} is not resumable: give the trainer dataset_config="
                f"ResumableDataConfig(row_id=..., resumable=[{dataset!r}])"
            )
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.epoch = self.position = self.samples = 0
        self._shard: ResumableShard = shard
        self._prefetch_batches, self._buffer_size = prefetch_batches, local_shuffle_buffer_size
        self._seed, self._allow_change = local_shuffle_seed, frozenset(allow_change)
        # Ids trained by this rank in this epoch, and those it took over from ranks that no longer exist.
        self._trained, self._recent = RowSet.empty(), list[RowSet]()
        self._pending: tuple[RowSet, int] | None = None
        self._iterator: DataIterator | None = None
        self._filtered = False
        self._num_loads = 0

    def __iter__(self) -> Iterator[RowBatch]:
        """The batches of what is left of the epoch, each to be counted by `on_step` before the next."""
        loads, self._pending = self._num_loads, None
        # Each rank knows only its own rows. The sets are disjoint, so an id in two of them is not unique.
        trained = RowSet.disjoint_union(self._ranks.all_gather("share the rows trained", self._merged()))
        with closing(self._rows(trained)) as mine:
            while True:
                rows = next(mine, {})
                num_rows = len(rows[self._shard.row_id]) if rows else 0
                counts = [count for (count,) in self._ranks.all_gather_ints("count the rows", [num_rows])]
                # Decided from the counts of all ranks: one that ended on its own would leave the others waiting.
                if not any(counts):
                    break
                ids = RowSet.of(ids_of(rows[self._shard.row_id], self._shard.row_id)) if rows else RowSet.empty()
                self._pending = (ids, sum(counts))
                yield self._batch(rows, counts)
                if self._num_loads != loads:
                    raise RuntimeError("a state was loaded while iterating: restore first, then make the iterator")
                if self._pending is not None:
                    raise RuntimeError("call Checkpointer.step, or on_step, exactly once for every batch")
        self.epoch, self.position = self.epoch + 1, 0
        self._trained, self._recent = RowSet.empty(), []

    def on_step(self, *, step: int) -> None:
        """Count the batch in hand as trained."""
        if self._pending is None:
            raise RuntimeError("there is no batch in hand to count as trained: one step for each batch")
        ids, num_samples = self._pending
        self._pending = None
        self._recent.append(ids)
        self.position += num_samples
        self.samples += num_samples
        if len(self._recent) >= _MERGE_EVERY:
            self._merged()

    def state_dict(self) -> dict[str, Any]:
        trained = self._merged()
        return {
            "epoch": self.epoch,
            "position": self.position,
            "samples": self.samples,
            "global_batch_size": self.global_batch_size,
            "first": torch.from_numpy(trained.first.copy()),
            "last": torch.from_numpy(trained.last.copy()),
        }

    def check_saved(self, saved: Mapping[str, Any]) -> tuple[str, ...]:
        """The reasons why `saved` can't be loaded, one line each; changes nothing."""
        # The batch size is not in checkpoints of earlier versions.
        given = {"global_batch_size": 1, **saved} if isinstance(saved, Mapping) else saved
        wrong = count_problems(given, {"epoch": 0, "position": 0, "samples": 0, "global_batch_size": 1})
        if not wrong and not _has_rows(saved):
            wrong = ("first and last are no ranges of row ids in the checkpoint: it is not one of ours",)
        if wrong:
            return wrong
        if not self.changed_from(saved) or "global_batch_size" in self._allow_change:
            return ()
        was = saved["global_batch_size"]
        return (
            f"global_batch_size was {was} and is {self.global_batch_size}: this changes what a step means to "
            f"schedulers and learning rate; give global_batch_size={was}, or allow_change=['global_batch_size']",
        )

    def check_resized(self, saved: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
        """The same as `check_saved`, when a different number of workers saved it."""
        return problems_of_all(self.check_saved, saved)

    def changed_from(self, saved: Mapping[str, Any]) -> tuple[str, ...]:
        """What will not be as it was saved, in a few words; changes nothing."""
        # Checkpoints of earlier versions lack it.
        was = saved.get("global_batch_size", self.global_batch_size)
        return () if was == self.global_batch_size else (f"global_batch_size {was:,} -> {self.global_batch_size:,}",)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._load(state_dict, _row_set(state_dict))

    def check_resize(self, name: str, world: World) -> None:
        """Any number of ranks will do."""

    def resize(self, saved: Mapping[int, Mapping[str, Any]], world: World) -> str:
        # All ids go to rank 0: `__iter__` joins the sets of all ranks again, and each id may be in only one of them.
        everything = RowSet.disjoint_union([_row_set(state) for state in saved.values()])
        self._load(saved[0], everything if world.rank == 0 else RowSet.empty())
        left_out = f"{self.position:,} rows of {len(saved)} workers are left out of the rest of the epoch"
        return "; ".join([left_out, *self.changed_from(saved[0])])

    def describe(self) -> str:
        shares = " + ".join(map(str, split_evenly(self.global_batch_size, self._ranks.world_size)))
        return f"epoch {self.epoch}, {self.position:,} rows trained; global batch {self.global_batch_size} as {shares}"

    def _load(self, state: Mapping[str, Any], trained: RowSet) -> None:
        self.epoch, self.position, self.samples = state["epoch"], state["position"], state["samples"]
        self._trained, self._recent, self._pending = trained, [], None
        self._num_loads += 1

    def _merged(self) -> RowSet:
        self._trained, self._recent = RowSet.disjoint_union([self._trained, *self._recent]), []
        return self._trained

    def _rows(self, trained: RowSet) -> Generator[Columns, None, None]:
        """This rank's rows of the rest of the epoch, a share of a global batch at a time."""
        seed = None if self._seed is None else hash((self._seed, self.epoch, self._ranks.rank)) % 2**32
        for rows in self._split(trained).iter_batches(
            batch_size=split_evenly(self.global_batch_size, self._ranks.world_size)[self._ranks.rank],
            batch_format="numpy",
            prefetch_batches=self._prefetch_batches,
            local_shuffle_buffer_size=self._buffer_size,
            local_shuffle_seed=seed,
        ):
            if self._shard.row_id not in rows:
                raise ValueError(f"row_id={self._shard.row_id!r} is no column of the dataset, which has {sorted(rows)}")
            yield rows

    def _split(self, trained: RowSet) -> DataIterator:
        """This rank's part of a split that all ranks share; a new one, collectively, if rows are, or were, left out."""
        if self._iterator is None or self._filtered or len(trained):
            outcome, made = Outcome(), b""
            with outcome.catch():
                if self._ranks.rank == 0:
                    splits = self._shard.split(trained, self._ranks.world_size)
                    made = cloudpickle.dumps(splits)  # type: ignore[no-untyped-call]  # ray's copy has no types
            self._ranks.raise_if_any_failed("split the dataset", outcome)
            shared = cloudpickle.loads(self._ranks.broadcast("share the split", made))
            self._iterator, self._filtered = shared[self._ranks.rank], len(trained) > 0
        return self._iterator

    def _batch(self, rows: Columns, counts: list[int]) -> RowBatch:
        num_samples, num_micro = sum(counts), -(-max(counts) // self.micro_batch_size)
        stand_in = {name: values[:1] for name, values in rows.items()}
        if min(counts) == 0:
            # Padding is a row of this very batch, as in GlobalBatchSampler: with any other row, 0.0 * loss could be the
            # first NaN of the step.
            giver = counts.index(max(counts))
            mine = stand_in if self._ranks.rank == giver else None
            given = self._ranks.all_gather("share a row", mine)[giver]
            assert given is not None
            stand_in = stand_in or given
        micros, start = [], 0
        for size in split_evenly(counts[self._ranks.rank], num_micro):
            data = {name: values[start : start + size] for name, values in rows.items()}
            start += size
            scale = self._ranks.world_size / num_samples
            micros.append(RowMicroBatch(data, scale) if size else RowMicroBatch(stand_in, 0.0, is_padding=True))
        return RowBatch(self.epoch, num_samples, tuple(micros))


def _has_rows(saved: Mapping[str, Any]) -> bool:
    """Whether the tensors of the ranges of rows are there; they are not read yet."""
    first, last = saved.get("first"), saved.get("last")
    if not isinstance(first, torch.Tensor) or not isinstance(last, torch.Tensor):
        return False
    return first.dtype == last.dtype == torch.int64 and first.dim() == 1 and first.shape == last.shape


def _row_set(state: Mapping[str, Any]) -> RowSet:
    return RowSet(state["first"].numpy(), state["last"].numpy())
