"""The data of a loader beside the micro-batches it was loaded for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

from ray_stateful.states.derived import derived_seed
from ray_stateful.states.shares import GlobalBatch, MicroBatch

T = TypeVar("T")


class PairedBatch(Generic[T]):
    """One worker's share of one global batch with its data: iterate over it once, for `(micro, data)`.

    The loader gives its data once. To go over it more often (a GAN, the closure of LBFGS), keep it: `list(batch)`.
    """

    def __init__(self, batch: GlobalBatch, data: Iterator[T]) -> None:
        self.batch = batch
        self._data = data
        self._num_taken = 0
        self._is_begun = False

    @property
    def epoch(self) -> int:
        return self.batch.epoch

    @property
    def num_samples(self) -> int:
        return self.batch.num_samples

    def __len__(self) -> int:
        return len(self.batch)

    def __iter__(self) -> Iterator[tuple[MicroBatch, T]]:
        if self._is_begun:
            raise RuntimeError(
                f"the batch at sample {self.batch.position} of epoch {self.batch.epoch} was iterated over before, and "
                "its data is gone: keep it with list(batch) to go over it more than once"
            )
        self._is_begun = True
        return self._pairs()

    def _pairs(self) -> Iterator[tuple[MicroBatch, T]]:
        while self._num_taken < len(self.batch):
            micro = self.batch.micro_batches[self._num_taken]
            yield micro, self._take()

    def skip_rest(self) -> None:
        """Take and drop the data that was not iterated over; otherwise the next batch would get it."""
        while self._num_taken < len(self.batch):
            self._take()

    def _take(self) -> T:
        self._num_taken += 1
        try:
            return next(self._data)
        except StopIteration:
            raise RuntimeError(
                f"the loader ended at the batch at sample {self.batch.position} of epoch {self.batch.epoch}, before "
                "the epoch did: give it batches.micro_batches() as batch_sampler"
            ) from None


def paired(
    batches: Iterator[GlobalBatch], loader: Iterable[T], seed: Callable[[], tuple[int, ...]]
) -> Iterator[PairedBatch[T]]:
    with _global_torch_stream_left_alone(derived_seed("loader", *seed())):
        data = iter(loader)
    for batch in batches:
        pair = PairedBatch(batch, data)
        yield pair
        pair.skip_rest()


@contextmanager
def _global_torch_stream_left_alone(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
