"""Whether the paths of an index make up one structure of dicts and lists. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterable

from ray_stateful.format.rows import KeyPath, StoredChunk


def structure_problem(rows: Iterable[StoredChunk]) -> str | None:
    """Why the paths of `rows` do not make up one structure; `None` if they do.

    A container has dict keys or list positions below it, not both; a list has all its positions, as it is filled up
    to the last of them; nothing is below a leaf. A tree replaces the values below it: no tensor or tree may be there.
    """
    rows = list(rows)
    trees = {_as_text(row.path) for row in rows if row.is_tree}
    children: dict[KeyPath, dict[bool, set[str | int]]] = {}
    leaves: set[KeyPath] = set()
    for row in rows:
        path = row.path
        text = _as_text(path) if trees else ()
        above = [depth for depth in range(1, len(path)) if text[:depth] in trees] if trees else []
        if above and (row.is_tree or row.dtype is not None):
            return f"{row.key!r} is below a tree, which replaces everything below it"
        if above:
            continue
        leaves.add(path)
        for depth in range(len(path)):
            below = children.setdefault(path[:depth], {True: set(), False: set()})
            below[type(path[depth]) is int].add(path[depth])
    for path, below in children.items():
        key, positions = ".".join(map(str, path)), below[True]
        if path in leaves:
            return f"{key!r} is a value, and has entries below it"
        if positions and (below[False] or not path):
            return f"{key!r} has both list positions and dict keys"
        if positions and max(map(int, positions)) != len(positions) - 1:
            return f"{key!r} is a list of {len(positions)} entries, the last at {max(map(int, positions)):,}"
    return None


def _as_text(path: KeyPath) -> tuple[str, ...]:
    # Compared as text: DCP's own paths have "1" where a tree has the int 1.
    return tuple(map(str, path))
