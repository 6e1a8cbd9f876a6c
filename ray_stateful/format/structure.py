"""Whether the paths of an index make up one structure of dicts and lists. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ray_stateful.format.rows import IntKey, KeyPath, StoredChunk


def structure_problem(rows: Iterable[StoredChunk]) -> str | None:
    """Why the paths of `rows` do not make up one structure; `None` if they do.

    A container has dict keys or list positions below it, not both; a list has all its positions, as it is filled up
    to the last of them; nothing is below a leaf. A tree replaces the values below it: no tensor or tree may be there.
    """
    rows = list(rows)
    trees = {_as_text(row.path) for row in rows if row.is_tree}
    paths: list[KeyPath] = []
    for row in rows:
        text = _as_text(row.path) if trees else ()
        above = [depth for depth in range(1, len(row.path)) if text[:depth] in trees] if trees else []
        if above and (row.is_tree or row.dtype is not None):
            return f"{row.key!r} is below a tree, which replaces everything below it"
        if not above:
            paths.append(row.path)
    # In this order all that is below one container stands in a row. So only the containers above the path at hand are
    # in memory: with a set for each of those of 64 steps, a path would take a hundred times its length.
    paths.sort(key=_sortable)
    containers: list[_Container] = []
    last: KeyPath = ()
    for path in paths:
        shared = _num_shared(last, path)
        if shared == len(path):
            continue  # a tree and a leaf at one place
        if last and shared == len(last):
            return f"{_key(last)!r} is a value, and has entries below it"
        problem = _close(containers, last, shared + 1)
        if problem is not None:
            return problem
        for depth in range(shared, len(path)):
            if depth == len(containers):
                containers.append(_Container())
            containers[depth].add(path[depth])
        last = path
    return _close(containers, last, 0)


@dataclass(slots=True)
class _Container:
    """What is directly below a dict or list: how many positions, the largest of them, and whether there are keys."""

    num_positions: int = 0
    largest: int = -1
    has_keys: bool = False

    def add(self, step: str | int) -> None:
        if type(step) is int:
            self.num_positions += 1
            self.largest = max(self.largest, step)
        else:
            self.has_keys = True


def _close(containers: list[_Container], path: KeyPath, num_left: int) -> str | None:
    """Drop all but the first `num_left` containers on the way to `path`; returns what is wrong with one of them."""
    while len(containers) > num_left:
        one = containers.pop()
        key = _key(path[: len(containers)])
        if one.num_positions and (one.has_keys or not containers):
            return f"{key!r} has both list positions and dict keys"
        if one.largest != one.num_positions - 1:
            return f"{key!r} is a list of {one.num_positions} entries, the last at {one.largest:,}"
    return None


def _num_shared(one: KeyPath, other: KeyPath) -> int:
    """How many steps two paths share from the beginning."""
    shared = 0
    for a, b in zip(one, other, strict=False):
        if type(a) is not type(b) or a != b:
            break
        shared += 1
    return shared


def _sortable(path: KeyPath) -> tuple[str, ...]:
    # Ints end in half a character, which no text of an index has: the int 1 and the text "1" are two containers.
    return tuple(
        step if type(step) is str else f"{int(step)}\ud800{'k' if isinstance(step, IntKey) else 'p'}" for step in path
    )


def _key(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _as_text(path: KeyPath) -> tuple[str, ...]:
    # Compared as text: DCP's own paths have "1" where a tree has the int 1.
    return tuple(map(str, path))
