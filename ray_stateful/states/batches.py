"""The order of the samples, whatever the number of workers: global batches, and each worker's share of them.

A position in an epoch means the same in every world, so a run that was saved by four workers goes on with three: the
global batch is kept and split anew. How it is split is decided in `shares`, by pure functions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from operator import index
from typing import Any, Literal, SupportsIndex, TypeVar

import torch.distributed as dist
from torch.utils.data import DataLoader

from ray_stateful.errors import StateMismatch
from ray_stateful.states.counts import count_problems, is_whole
from ray_stateful.states.paired import PairedBatch, paired
from ray_stateful.states.permutation import Permutation
from ray_stateful.states.shares import GlobalBatch, MicroBatch, share_of, split_evenly

Change = Literal["drop_last", "global_batch_size", "length"]
T = TypeVar("T")

# What a different value in a resumed run does.
_EFFECTS: dict[Change, str] = {
    "length": "ends the epoch where it stands, because another length is another order",
    "global_batch_size": "changes what a step means to schedulers and learning rate",
    "drop_last": "changes which samples are trained in an epoch",
}

# The least valid value of each saved count.
_LEAST = {"epoch": 0, "position": 0, "samples": 0, "length": 1, "global_batch_size": 1}


class GlobalBatchSampler:
    """A shuffled order of a map-style dataset that does not depend on the number of workers.

    ```python
    while batches.epoch < num_epochs:
        for batch in batches:                       # from the position up to the end of the epoch
            for micro in accumulate(model, batch):
                (loss_fn(model, dataset[micro.indices]).sum() * micro.loss_scale).backward()
            optimizer.step(); optimizer.zero_grad()
            checkpointer.step()                     # or batches.on_step(step=...): counts the batch as trained
    ```

    With a DataLoader, which may have workers and prefetch as it likes:

    ```python
    loader = DataLoader(dataset, batch_sampler=batches.micro_batches(), num_workers=4)
    for batch in batches.paired_with(loader):
        for micro, data in accumulate(model, batch):
            (loss_fn(model, data).sum() * micro.loss_scale).backward()
    ```

    The state is the same on every rank and counts what was trained. The seed is part of it: a resumed run keeps the
    checkpoint's. Give every rank the same seed and `micro_batch_size`, so that all have the same order and the same
    number of micro-batches. Batch statistics (BatchNorm, balancing of experts) see micro-batches, as with any sampler.

    Args:
        length: Samples in the dataset, at least one.
        global_batch_size: Samples per optimizer step, over all workers.
        micro_batch_size: Samples per forward pass of one worker, at most; may differ in a resumed run.
        drop_last: Leave out the end of an epoch that does not fill a global batch. Otherwise it is a short batch,
            weighted as such.
        rank, world_size: Among the workers that have different data: with tensor parallelism, those of the mesh's data
            axis. Give both, or neither for those of `torch.distributed` (a world of one if that is not initialised).
        allow_change: What may differ from the checkpoint. A different `"global_batch_size"` applies from the position
            on, while schedulers keep counting steps. A different `"length"` means a different order, so the epoch ends
            there. A different `"drop_last"` applies to the end of this epoch.

    Attributes:
        epoch: The epoch of the position, from 0.
        position: Samples trained in this epoch.
        samples: Samples trained in all.
    """

    def __init__(
        self,
        length: SupportsIndex,
        *,
        global_batch_size: SupportsIndex,
        micro_batch_size: SupportsIndex,
        seed: SupportsIndex = 0,
        drop_last: bool = False,
        rank: SupportsIndex | None = None,
        world_size: SupportsIndex | None = None,
        allow_change: Collection[Change] = (),
    ) -> None:
        # As Python ints: NumPy's have no bit_length, and would be saved as 64-bit NumPy integers.
        length, global_batch_size, micro_batch_size = index(length), index(global_batch_size), index(micro_batch_size)
        for name, value in [
            ("length", length),
            ("global_batch_size", global_batch_size),
            ("micro_batch_size", micro_batch_size),
        ]:
            if value < 1:
                raise ValueError(f"{name}={value} leaves nothing to train on: give at least 1")
        if drop_last and length < global_batch_size:
            raise ValueError(
                f"drop_last leaves nothing of length={length} with global_batch_size={global_batch_size}: "
                "give a smaller global batch, or drop_last=False"
            )
        unknown = sorted(set(allow_change) - _EFFECTS.keys())
        if unknown:
            raise ValueError(f"allow_change={unknown} names nothing that could change: {', '.join(_EFFECTS)}")
        if (rank is None) != (world_size is None):
            # Taking the missing one from all processes would leave some shares of each batch to no worker.
            raise ValueError(f"rank={rank} and world_size={world_size} go together: give both, or neither")
        if rank is None or world_size is None:
            in_group = dist.is_available() and dist.is_initialized()
            rank, world_size = (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)
        self.rank, self.world_size = index(rank), index(world_size)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} is not in a world of {self.world_size}")
        self.length = length
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = self._given_seed = index(seed)
        self.drop_last = drop_last
        self.epoch = 0
        self.position = 0
        self.samples = 0
        self._allow_change = frozenset(allow_change)
        self._num_loads = 0

    def __iter__(self) -> Iterator[GlobalBatch]:
        """The global batches from here to the end of the epoch, each to be counted by `on_step` before the next."""
        epoch = self.epoch
        while self.epoch == epoch:
            batch, loads = self._batch(epoch, self.position), self._num_loads
            expected = self._after(epoch, self.position)
            yield batch
            self._check_not_loaded_since(loads)
            if (self.epoch, self.position) != expected:
                raise RuntimeError(
                    f"after the batch at sample {batch.position} of epoch {epoch}, the run should stand at (epoch, "
                    f"sample) {expected} and stands at {(self.epoch, self.position)}: call Checkpointer.step, or "
                    "on_step, exactly once for every batch, also for one that is passed over"
                )

    def __len__(self) -> int:
        """Global batches from here to the end of the epoch."""
        remaining = self.length - self.position
        return remaining // self.global_batch_size if self.drop_last else -(-remaining // self.global_batch_size)

    def micro_batches(self) -> MicroBatchView:
        """The micro-batches of the rest of the epoch as lists of indices: a DataLoader's `batch_sampler`."""
        return MicroBatchView(self)

    def paired_with(self, loader: Iterable[T]) -> Iterator[PairedBatch[T]]:
        """Iterate as over the sampler itself, with each micro-batch's data beside it.

        The loader is started at the first `next`, under a random seed of its own: (seed, epoch, position, rank). A
        DataLoader draws its workers' seeds from torch's global stream, so a run that is resumed in mid-epoch, and so
        starts it once more, would go on with different dropout masks than an uninterrupted run. What the loader's
        workers draw (augmentation) is not saved, and differs after a resume in mid-epoch.

        Args:
            loader: Gives the data of `micro_batches()` in order: a DataLoader that has these as `batch_sampler`.

        Raises:
            ValueError: a DataLoader takes its samples from elsewhere, or gives them in a different order.
        """
        if isinstance(loader, DataLoader):
            self._check_takes_ours(loader)
        return paired(iter(self), loader, lambda: (self.seed, self.epoch, self.position, self.rank))

    def on_step(self, *, step: int) -> None:
        """Count the global batch at the position as trained; `step` is not used, as the position tells enough."""
        self.samples += self._num_samples(self.position)
        self.epoch, self.position = self._after(self.epoch, self.position)

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "position": self.position,
            "samples": self.samples,
            "seed": self.seed,
            "length": self.length,
            "global_batch_size": self.global_batch_size,
            "drop_last": self.drop_last,
        }

    def check_saved(self, saved: Mapping[str, Any]) -> tuple[str, ...]:
        """What keeps `saved` from being loaded, one line each; changes nothing."""
        wrong = count_problems(saved, _LEAST)
        if not wrong and (not is_whole(saved.get("seed")) or saved["position"] > saved["length"]):
            wrong = (
                f"its seed is no number, or its position beyond the length {saved['length']:,}: it is not one of ours",
            )
        if not wrong and not isinstance(saved.get("drop_last", False), bool):
            wrong = ("its drop_last is neither true nor false: it is not one of ours",)
        if wrong:
            return wrong
        return tuple(
            f"{name} was {saved[name]} and is {getattr(self, name)}: this {_EFFECTS[name]}; give {name}={saved[name]}, "
            f"or allow_change=[{name!r}]"
            for name in self._changed(saved)
            if name not in self._allow_change
        )

    def changed_from(self, saved: Mapping[str, Any]) -> tuple[str, ...]:
        """What will not be as it was saved, in a few words each; changes nothing."""
        changes = [f"{name} {_text(saved[name])} -> {_text(getattr(self, name))}" for name in self._changed(saved)]
        return (*changes, f"epoch {saved['epoch']} ended early") if self._ends_early(saved) else tuple(changes)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was saved, by any number of workers.

        Raises:
            StateMismatch: a saved count is invalid, or an argument differs that `allow_change` does not name.
        """
        problems = self.check_saved(state_dict)
        if problems:
            raise StateMismatch("of the batches", problems)
        # In checkpoints of earlier versions they may be NumPy integers.
        self.epoch, self.position = int(state_dict["epoch"]), int(state_dict["position"])
        self.samples, self.seed = int(state_dict["samples"]), int(state_dict["seed"])
        if self._ends_early(state_dict):
            self.epoch, self.position = self.epoch + 1, 0
        self._num_loads += 1

    def describe(self) -> str:
        shares = split_evenly(self.global_batch_size, self.world_size)
        split = " + ".join(str(size) for size in shares)
        if self.world_size > 4:
            split = " + ".join(f"{shares.count(size)} x {size}" for size in sorted(set(shares), reverse=True))
        where = f"epoch {self.epoch}, sample {self.position:,} of {self.length:,}"
        of = [] if self.seed == self._given_seed else [f"seed {self.seed} of the checkpoint, not {self._given_seed}"]
        return "; ".join([where, f"global batch {self.global_batch_size} kept as {split}", *of])

    def _changed(self, saved: Mapping[str, Any]) -> list[Change]:
        # drop_last is not in checkpoints of earlier versions.
        saved = {"drop_last": self.drop_last, **saved}
        return [name for name in _EFFECTS if saved[name] != getattr(self, name)]

    def _ends_early(self, saved: Mapping[str, Any]) -> bool:
        """Whether an epoch that was saved before its end has nothing left to train here."""
        position: int = saved["position"]
        return position > 0 and (saved["length"] != self.length or self._num_samples(position) == 0)

    def _check_takes_ours(self, loader: DataLoader[Any]) -> None:
        """Refuse a loader that would train on other samples than those that are counted."""
        # With batch_size=None the sampler gives the lists of indices.
        view = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        if not isinstance(view, MicroBatchView):
            raise ValueError(
                f"the loader's batch_sampler is a {type(view).__name__}, which chooses other samples than are counted: "
                "give it batches.micro_batches(); ray.train.torch.prepare_data_loader replaces that, unless it is told "
                "prepare_data_loader(..., add_dist_sampler=False)"
            )
        if view.batches is not self:
            raise ValueError("the loader's batch_sampler is a view of another sampler: give it batches.micro_batches()")
        if not getattr(loader, "in_order", True):
            raise ValueError(
                "the loader has in_order=False, which gives one micro-batch the data of another: leave it out"
            )

    def _num_samples(self, position: int) -> int:
        """The number of samples in the global batch at `position`; 0 if the epoch ends there."""
        remaining = self.length - position
        if remaining < self.global_batch_size:
            return 0 if self.drop_last else remaining
        return self.global_batch_size

    def _after(self, epoch: int, position: int) -> tuple[int, int]:
        position += self._num_samples(position)
        return (epoch, position) if self._num_samples(position) else (epoch + 1, 0)

    def _batch(self, epoch: int, position: int) -> GlobalBatch:
        order = Permutation(self.length, seed=self.seed, epoch=epoch)
        num_samples = self._num_samples(position)
        micros = share_of(
            range(position, position + num_samples),
            rank=self.rank,
            world_size=self.world_size,
            micro_batch_size=self.micro_batch_size,
        )
        indices = order.take(range(micros[0].start, micros[-1].stop)).tolist()
        # A stand-in from this very batch: if its loss is not finite, 0.0 * loss is NaN, but then the batch itself is
        # spoiled already.
        stand_in = indices[:1] or [order[position]]
        return GlobalBatch(
            epoch=epoch,
            position=position,
            num_samples=num_samples,
            micro_batches=tuple(
                MicroBatch(
                    indices=indices[micro.start - micros[0].start : micro.stop - micros[0].start],
                    loss_scale=self.world_size / num_samples,
                )
                if micro
                else MicroBatch(indices=stand_in, loss_scale=0.0, is_padding=True)
                for micro in micros
            ),
        )

    def _ahead(self) -> Iterator[GlobalBatch]:
        """The rest of the epoch, without waiting for steps: for prefetching. Counts nothing as trained."""
        # From where the run stands now, and not at the first `next`: a first batch may have been skipped by then.
        return self._from(self.epoch, self.position, self._num_loads)

    def _from(self, epoch: int, position: int, loads: int) -> Iterator[GlobalBatch]:
        at = epoch, position
        while at[0] == epoch:
            yield self._batch(*at)
            self._check_not_loaded_since(loads)
            at = self._after(*at)

    def _check_not_loaded_since(self, loads: int) -> None:
        if self._num_loads != loads:
            raise RuntimeError("a state was loaded while iterating: restore first, then make the iterator")


class MicroBatchView:
    """The micro-batches that a `GlobalBatchSampler` still has in its epoch, as lists of indices. Counts nothing."""

    def __init__(self, batches: GlobalBatchSampler) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return (micro.indices for batch in self.batches._ahead() for micro in batch)

    def __len__(self) -> int:
        batches = self.batches
        shares = split_evenly(batches.global_batch_size, batches.world_size)
        # Only the last global batch of an epoch may be short.
        full, short = divmod(batches.length - batches.position, batches.global_batch_size)
        last = 0 if batches.drop_last else -(-short // batches.world_size)
        return full * -(-shares[0] // batches.micro_batch_size) + -(-last // batches.micro_batch_size)


def _text(value: int) -> str:
    return str(value) if isinstance(value, bool) else f"{value:,}"
