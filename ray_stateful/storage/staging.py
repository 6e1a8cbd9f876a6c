"""A copy of this rank's shards in host memory, so that training may change them while they are written.

The buffers are kept and used again: after the first save, staging allocates nothing. They may be filled again only
when what reads them has ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed.tensor import DTensor

# What FSDP1 saves. A shard is told from others of the same tensor by its offsets; a DTensor has one a rank.
Offsets = tuple[int, ...] | None


class Staging:
    """Host buffers for the tensors of one state."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, Offsets], torch.Tensor] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    @torch.no_grad()
    def fill(self, flat: Mapping[str, Any]) -> StagedTensors:
        """Copy the local tensors of a flat state dict.

        Copies from a CUDA device run on a stream of their own, to pinned memory. What the training stream does next
        waits for them on the device, and the host does not: `StagedTensors.wait` is for whoever reads the copies.
        """
        staged: dict[tuple[str, Offsets], torch.Tensor] = {}
        events: list[torch.cuda.Event] = []
        on_device: dict[torch.device, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for key, offsets, tensor in local_tensors(flat):
            buffer = self._buffer(key, offsets, tensor)
            staged[key, offsets] = buffer
            if tensor.device.type == "cuda":
                # What is conjugated or negated by name only would be so on the host, before the bytes are there.
                tensor = tensor.resolve_conj().resolve_neg()
                on_device.setdefault(tensor.device, []).append((buffer, tensor))
            else:
                buffer.copy_(tensor)
        for device, copies in on_device.items():
            events.append(self._copy_on_stream(device, copies))
        # Whatever is not in this state any more would only be kept for nothing.
        self._buffers = dict(staged)
        return StagedTensors(staged, events)

    def _buffer(self, key: str, offsets: Offsets, tensor: torch.Tensor) -> torch.Tensor:
        known = self._buffers.get((key, offsets))
        if known is not None and known.shape == tensor.shape and known.dtype == tensor.dtype:
            return known
        # Pinned, or a copy would make the host wait for the device; and only then, as pinning is slow and scarce.
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
        # Whoever waits for it gives its core away meanwhile: it is training's.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # untyped in torch
        stream.record_event(event)
        # ... and the next one must not write before it is copied.
        training.wait_event(event)
        return event


class StagedTensors:
    """What was copied, to be found by key and offsets."""

    def __init__(self, tensors: dict[tuple[str, Offsets], torch.Tensor], events: list[torch.cuda.Event]) -> None:
        self._tensors, self._events = tensors, events

    def wait(self) -> None:
        """Wait until all copies are there."""
        for event in self._events:
            # A thread's device is the first one until it says otherwise, and a context there takes memory of it.
            with torch.cuda.device(event.device):
                event.synchronize()

    def get(self, key: str, offsets: Offsets) -> torch.Tensor:
        """The copy of a tensor's local shard; `offsets` tell several shards of one tensor apart."""
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
