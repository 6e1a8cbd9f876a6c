"""Each worker's share of one global batch, in micro-batches: the values, and the pure functions that make them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one forward and backward pass takes.

    With `loss = per_sample_losses.sum() * loss_scale`, summed over the micro-batches and averaged over the workers as
    DDP and FSDP do, the gradient is that of the mean over the global batch, for unequal shares too.

    A worker that has fewer samples than there are micro-batches gets padding: one sample of the same global batch, with
    a `loss_scale` of 0.0. Run it like any other, forward and backward, because the other ranks wait in the collectives
    of both; it adds zeros, and does not count as trained.
    """

    indices: list[int]
    loss_scale: float
    is_padding: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GlobalBatch:
    """One worker's share of one global batch: iterate over it for the micro-batches.

    `position` and `num_samples` count samples of the epoch and are the same on every rank, as is `len()`.
    """

    epoch: int
    position: int
    num_samples: int
    micro_batches: tuple[MicroBatch, ...]

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.micro_batches)

    def __len__(self) -> int:
        return len(self.micro_batches)


def split_evenly(num: int, parts: int) -> list[int]:
    """`num` in `parts` sizes that differ by one at most, the larger first."""
    size, larger = divmod(num, parts)
    return [size + 1] * larger + [size] * (parts - larger)


def share_of(positions: range, *, rank: int, world_size: int, micro_batch_size: int) -> list[range]:
    """The micro-batches of `rank`, as positions; an empty range is one in which it has no sample but takes part.

    Every rank gets the number that the largest share needs: each micro-batch is a round of collectives, and a rank that
    skipped one would leave its peers waiting (or worse, meet them in the next one).
    """
    shares = split_evenly(len(positions), world_size)
    num_micro = -(-shares[0] // micro_batch_size)
    start, micros = positions.start + sum(shares[:rank]), []
    # Even micro-batches, not full ones first: then a share that is one sample smaller seldom needs padding.
    for size in split_evenly(shares[rank], num_micro):
        micros.append(range(start, start + size))
        start += size
    return micros
