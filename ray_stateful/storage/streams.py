"""Orders CUDA work between threads, which a device does not do by itself: each thread has its own current stream.

What the calling thread has queued on a stream of its choice (`with torch.cuda.stream(...)`) is not waited for by a
different thread, which is on the default stream. So code that hands tensors to other threads waits for the device
before and after. For host tensors there is nothing to wait for.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


def wait_before_other_threads(tensors: Iterable[torch.Tensor]) -> None:
    """Wait until all that this thread has queued for the devices of `tensors` is done."""
    for device in _devices(tensors):
        torch.cuda.current_stream(device).synchronize()


def wait_for_other_threads(tensors: Iterable[torch.Tensor]) -> None:
    """Wait until all that any thread has queued for the devices of `tensors` is done."""
    for device in _devices(tensors):
        torch.cuda.synchronize(device)


def _devices(tensors: Iterable[torch.Tensor]) -> set[torch.device]:
    return {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
