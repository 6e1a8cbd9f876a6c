"""Between threads, a CUDA device keeps no order by itself: each thread has a current stream of its own.

What the calling thread has queued on a stream of its choice (`with torch.cuda.stream(...)`) another thread, which is on
the default stream, does not wait for. So whoever hands tensors to other threads waits for the device, before and
after. On the host there is nothing to wait for.
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
