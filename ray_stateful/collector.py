"""Pauses Python's cycle collector: where very many new objects all stay alive, it takes longer than making them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Turn the collector off in the whole process while the body runs; afterwards it is as it was before.

    If another thread turns it off for good meanwhile, it is on again afterwards: nothing tells the two apart.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
