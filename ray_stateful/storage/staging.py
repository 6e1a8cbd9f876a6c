"""A copy of this rank's shards in host memory, so that training may change them while they are written.

The buffers are kept and used again: after the first save, staging allocates nothing. They may be filled again only
when nothing reads them any more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

# The offsets of a shard of a `ShardedTensor`, which FSDP1 saves: a rank may have several shards of one. `None` for a
# DTensor, which has one shard per rank, and for a plain tensor.
Offsets = tuple[int, ...] | None


class Staging:
    """Host buffers for the tensors of one state."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, Offsets], torch.Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @torch.no_grad()
    def fill(self, flat: Mapping[str, Any]) -> StagedTensors:
        """Copy the local tensors of a flat state dict.

        Copies from a CUDA device run on a stream of their own, to pinned memory. The training stream waits for them on
        the device, but the host does not: before reading the copies, call `StagedTensors.wait`.
        """
        staged: dict[tuple[str, Offsets], torch.Tensor] = {}
        events: list[torch.cuda.Event] = []
        on_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for key, offsets, tensor in local_tensors(flat):
            buffer = self._buffer(key, offsets, tensor)
            staged[key, offsets] = buffer
            if tensor.device.type == "cuda":
                # A lazily conjugated or negated tensor would be resolved on the host, before its bytes have arrived.
                tensor = tensor.resolve_conj().resolve_neg()
                on_device.setdefault(tensor.device, []).append((buffer, tensor))
            else:
                buffer.copy_(tensor)
        for device, copies in on_device.items():
            events.append(self._copy_on_stream(device, copies))
        # Drop the buffers of tensors that are no longer in the state.
        self._buffers = dict(staged)
        return StagedTensors(staged, events)

    def _buffer(self, key: str, offsets: Offsets, tensor: torch.Tensor) -> torch.Tensor:
        known = self._buffers.get((key, offsets))
        if known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype:
            return known
        # Without pinned memory, copying from a device makes the host wait. Pinning is slow and pinned memory scarce, so
        # nothing else is pinned.
        pinned = tensor.device.type == "cuda"
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)

    def _copy_on_stream(
        self, device: torch.device, copies: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> torch.cuda.Event:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # untyped in torch
        stream = self._streams[device]
        training = torch.cuda.current_stream(device)
        # The last optimizer step must have written what is copied ...
        stream.wait_stream(training)
        with torch.cuda.stream(stream):
            for buffer, tensor in copies:
                buffer.copy_(tensor, non_blocking=True)
        # Blocking: a thread that waits for the event leaves its CPU core to training.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # untyped in torch
        stream.record_event(event)
        # ... and the next one must not write before it is copied.
        training.wait_event(event)
        return event


class StagedTensors:
    """The copies, by key and offsets."""

    def __init__(self, tensors: dict[tuple[str, Offsets], torch.Tensor], events: list[torch.cuda.Event]) -> None:
        self._tensors, self._events = tensors, events

    def wait(self) -> None:
        """Wait until all copies are there."""
        for event in self._events:
            # A new thread's current device is the first one, and using it would create a context that takes its memory.
            with torch.cuda.device(event.device):
                event.synchronize()

    def get(self, key: str, offsets: Offsets) -> torch.Tensor:
        """The copy of a tensor's local shard; `offsets` distinguish several shards of one tensor."""
        found = self._tensors.get((key, offsets))
        return self._tensors[key, None] if found is None else found


def local_tensors(flat: Mapping[str, Any]) -> Iterator[tuple[str, Offsets, torch.Tensor]]:
    """This rank's part of each tensor: key, offsets where a tensor may have several parts here, and the part."""
    for key, value in flat.items():
        if isinstance(value, ShardedTensor):
            for shard in value.local_shards():
                yield key, tuple(shard.metadata.shard_offsets), shard.tensor.detach()
        elif isinstance(value, DTensor):
            yield key, None, value.to_local().detach()
        elif isinstance(value, torch.Tensor):
            yield key, None, value.detach()
