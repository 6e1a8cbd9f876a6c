"""Python's search for cycles, put off: among very many new objects that all stay it takes longer than making them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Without it in the whole process, for as long as the body takes; then as it was before.

    Whoever turns it off for good in another thread meanwhile finds it on afterwards: nothing tells the two apart.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
