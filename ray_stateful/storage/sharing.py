"""Reads replicas once: ranks that want the same bytes divide the reading, and send each other what they read.

Data parallel replicas hold copies of each other's shards (DDP of everything, HSDP along one axis of its mesh, tensor
parallelism of what it replicates). If each of them read for itself, storage would be asked for the same bytes once per
replica.

There are two classes of requests: those of tensors that a rank holds whole, and those of shards. Ranks whose requests
of a class are the same form a group. Everything is decided from digests that all ranks have, so all ranks enter the
same collectives.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from ray_stateful.format.checksums import RunningChecksum
from ray_stateful.ranks import Outcome, Ranks
from ray_stateful.storage.reading import Request

_SEND = "send what was read"

# The most that is sent at once, which is also the memory that sending takes.
_BUCKET_BYTES = 32 << 20

# Requests of up to so many bytes in all have one reader; a smaller request counts as `_LEAST_BYTES` in this sum, as its
# tensor is stored with an archive around it.
_TOGETHER_BYTES = 1 << 20
_LEAST_BYTES = 512


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that want the same bytes. `requests` are this rank's, in an order that is the same on all of them.

    `readers` has, for each request, the rank that reads it.
    """

    ranks: tuple[int, ...]
    requests: tuple[Request, ...]
    readers: tuple[int, ...]

    @classmethod
    def of(cls, ranks: Sequence[int], requests: Sequence[Request]) -> Group:
        """Each request is read by the rank of the group with the fewest bytes so far.

        If the requests are small altogether, one rank reads them all, and sends them at once.
        """
        if sum(max(_num_bytes(request), _LEAST_BYTES) for request in requests) <= _TOGETHER_BYTES:
            return cls(tuple(ranks), tuple(requests), (ranks[0],) * len(requests))
        loads = [(0, rank) for rank in sorted(ranks)]
        readers = []
        for request in requests:
            load, reader = loads[0]
            heapq.heapreplace(loads, (load + _num_bytes(request), reader))
            readers.append(reader)
        return cls(tuple(ranks), tuple(requests), tuple(readers))


@dataclass(frozen=True, slots=True)
class Shared:
    """Who reads what. `groups` are those with this rank; `memberships` has the ranks of every group, in one order."""

    groups: tuple[Group, ...]
    memberships: tuple[tuple[int, ...], ...]

    def read_by(self, rank: int) -> Callable[[Request], bool]:
        """A function that tells whether `rank` must read a request itself."""
        others = {
            id(request)
            for group in self.groups
            for reader, request in zip(group.readers, group.requests, strict=True)
            if reader != rank
        }
        return lambda request: id(request) not in others


def classes_of(whole: Iterable[Request], shards: Iterable[Request]) -> list[list[Request]]:
    """The two classes of this rank's requests, each in an order that is the same on all ranks.

    Args:
        whole: Requests of tensors that this rank holds whole.
        shards: All others.
    """
    return [sorted(requests, key=_identity) for requests in (whole, shards)]


def digests(classes: Sequence[Sequence[Request]]) -> list[int]:
    """What `share` has to know about each rank: an integer for each class."""
    return [_digest(requests) for requests in classes]


def share(classes: Sequence[Sequence[Request]], everyone: Sequence[Sequence[int]], mine: int) -> Shared:
    """Find the ranks that want the same bytes. Pure.

    Args:
        classes: This rank's requests, as `classes_of` returns them.
        everyone: The `digests` of every rank, in rank order.
        mine: This rank.
    """
    groups: list[Group] = []
    memberships: list[tuple[int, ...]] = []
    for number, requests in enumerate(classes):
        members: dict[int, list[int]] = defaultdict(list)
        for rank, of_rank in enumerate(everyone):
            members[of_rank[number]].append(rank)
        for digest, of_digest in sorted(members.items()):
            # A digest of 0 stands for no requests at all.
            if digest != 0 and len(of_digest) > 1:
                memberships.append(tuple(of_digest))
                if mine in of_digest:
                    groups.append(Group.of(of_digest, requests))
    return Shared(tuple(groups), tuple(memberships))


def memory_for(shared: Shared) -> torch.Tensor:
    """Memory for what `exchange` sends at once: a rank that could not get it then would not receive, either."""
    num_bytes = sum(_num_bytes(request) for group in shared.groups for request in group.requests)
    return torch.empty(min(num_bytes, _BUCKET_BYTES), dtype=torch.uint8, device="cpu")


def exchange(shared: Shared, memory: torch.Tensor, ranks: Ranks) -> None:
    """Send every rank what its replicas read. Collective: all ranks call it, after all of them have read.

    Args:
        memory: As `memory_for` returned it.

    Raises:
        RankFailed: on every rank; some rank could not copy what it sent or was sent. Tensors may have any values.
        RankTimeout: a rank did not send in time.
    """
    mine = iter(shared.groups)
    outcome = Outcome()
    for members in shared.memberships:
        # `new_group` is a collective: all ranks call it, also those that are not in the group.
        timeout = timedelta(seconds=ranks.timeout_s)
        channel = ranks.group
        if len(members) < ranks.world_size:
            make = partial(dist.new_group, list(members), backend="gloo", timeout=timeout)
            channel = ranks.within_deadline("make a group of replicas", make)
        if ranks.rank not in members:
            continue
        try:
            for reader, tensors in _buckets(next(mine)):
                _send(tensors, reader, memory, channel, ranks, outcome)
        finally:
            if channel is not ranks.group:
                dist.destroy_process_group(channel)
    if shared.memberships:
        ranks.raise_if_any_failed(_SEND, outcome)


def _send(
    tensors: Sequence[torch.Tensor],
    reader: int,
    memory: torch.Tensor,
    channel: dist.ProcessGroup | None,
    ranks: Ranks,
    outcome: Outcome,
) -> None:
    sizes = [tensor.nbytes for tensor in tensors]
    bucket = memory[: sum(sizes)]
    parts = torch.split(bucket, sizes)
    with outcome.catch():
        if ranks.rank == reader:
            for part, tensor in zip(parts, tensors, strict=True):
                # `as_strided` sets the stride: a tensor of one element counts as contiguous whatever its stride is, and
                # `view` would keep it.
                resolved = tensor.cpu().resolve_conj().resolve_neg()
                part.copy_(resolved.contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8))
    # Also if that failed: the others are waiting to receive. And nothing but this, as an error of it is a peer's.
    ranks.within_deadline(_SEND, partial(dist.broadcast, bucket, src=reader, group=channel))
    with outcome.catch():
        if ranks.rank != reader:
            for part, tensor in zip(parts, tensors, strict=True):
                # Cloned first: a slice of the bucket may begin at a byte that is not aligned for its dtype.
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def _buckets(group: Group) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """What each reader sends, joined up to the size of a bucket; of a larger tensor, its parts."""
    of_reader: dict[int, list[torch.Tensor]] = defaultdict(list)
    for reader, request in zip(group.readers, group.requests, strict=True):
        of_reader[reader] += _parts(request.into.detach())
    for reader, tensors in sorted(of_reader.items()):
        bucket: list[torch.Tensor] = []
        num_bytes = 0
        for tensor in tensors:
            if bucket and num_bytes + tensor.nbytes > _BUCKET_BYTES:
                yield reader, bucket
                bucket, num_bytes = [], 0
            bucket.append(tensor)
            num_bytes += tensor.nbytes
        if bucket:
            yield reader, bucket


def _parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """Views of a tensor, each no larger than a bucket: runs of its rows, or parts of a row; none if it is empty."""
    if tensor.nbytes <= _BUCKET_BYTES:
        return [tensor] if tensor.nbytes else []
    rows = tensor.shape[0] * _BUCKET_BYTES // tensor.nbytes
    return torch.split(tensor, rows) if rows else [part for row in tensor for part in _parts(row)]


def _num_bytes(request: Request) -> int:
    return request.into.nbytes


def _identity(request: Request) -> tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return request.chunk.key, request.chunk.box.offsets, request.box.offsets, request.box.sizes


def _digest(requests: Sequence[Request]) -> int:
    if not requests:
        return 0
    digest = RunningChecksum()
    for request in requests:
        # The tensor is sent after casting, not the stored bytes: a rank with a different dtype has to read for itself.
        digest.update(repr((*_identity(request), request.chunk.dtype, request.into.dtype)).encode())
    return (int(digest.hexdigest(), 16) >> 1) | 1
