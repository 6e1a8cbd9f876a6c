"""How two checkpoints differ: keys, shapes, dtypes, each tensor's largest difference. Streaming, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch

from ray_stateful import slabs
from ray_stateful.errors import UnsupportedState
from ray_stateful.format import values
from ray_stateful.storage.base import Storage
from ray_stateful.storage.opening import OpenCheckpoint
from ray_stateful.storage.reader import value_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """An entry of which the two checkpoints have different kinds, shapes or dtypes."""

    key: str
    first: str
    second: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorDifference:
    """A tensor whose elements differ.

    `max_relative` is the largest |a - b| / max(|a|, |b|), between 0 and 2. An element that is a NaN or an infinity in
    one of the two counts as infinitely different. `num_different` compares bit for bit.
    """

    key: str
    num_elements: int
    num_different: int
    max_absolute: float
    max_relative: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """All that differs; `num_equal` entries are equal bit for bit.

    A dict or list without tensors is named, too, if it differs and no entry in it does: it is empty, or its keys have
    another order, or are ints where the other has text.
    """

    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    changed: tuple[Changed, ...]
    tensors: tuple[TensorDifference, ...]
    values: tuple[str, ...]
    num_equal: int

    @property
    def is_empty(self) -> bool:
        return not (self.only_in_first or self.only_in_second or self.changed or self.tensors or self.values)


def diff(
    first_storage: Storage,
    first: OpenCheckpoint,
    second_storage: Storage,
    second: OpenCheckpoint,
    *,
    progress: Callable[[int], None] | None = None,
) -> Difference:
    """Compare all entries of two checkpoints, whatever number of workers wrote them.

    Raises:
        DamagedCheckpoint: bytes of one are missing, or not those that were written.
    """
    shared = sorted(first.chunks.keys() & second.chunks.keys())
    described = {key: (_describe(first, key), _describe(second, key)) for key in shared}
    same = [key for key in shared if described[key][0] == described[key][1]]
    tensors = [key for key in same if first.chunks[key][0].dtype is not None]
    not_tensors = [key for key in same if first.chunks[key][0].dtype is None]
    different_values = tuple(
        key for key in not_tensors if not _same_value(first_storage, first, second_storage, second, key)
    )
    found: dict[str, _Running] = {}
    # One checkpoint decides how both are cut, so that slabs match: a foreign one, as its tensors are read whole.
    foreign = first if any(row[0].data_offset < 0 for row in first.chunks.values()) else second
    boxes = slabs.cut(foreign, tensors)
    for a, b in zip(
        slabs.stream(first_storage, first, boxes), slabs.stream(second_storage, second, boxes), strict=True
    ):
        found.setdefault(a.key, _Running()).add(a.tensor, b.tensor)
        if progress is not None:
            progress(a.tensor.numel() * a.tensor.element_size())
    differing = tuple(running.result(key) for key, running in found.items() if running.num_different)
    changed = tuple(Changed(key=k, first=a, second=b) for k, (a, b) in described.items() if a != b)
    only_in_first = first.chunks.keys() - second.chunks.keys()
    only_in_second = second.chunks.keys() - first.chunks.keys()
    told = {*only_in_first, *only_in_second, *different_values, *(one.key for one in changed)}
    trees = _different_trees(first, second, told)
    return Difference(
        only_in_first=tuple(sorted(only_in_first | trees - second.trees.keys())),
        only_in_second=tuple(sorted(only_in_second | trees - first.trees.keys())),
        changed=changed,
        tensors=differing,
        values=tuple(sorted((*different_values, *trees & first.trees.keys() & second.trees.keys()))),
        num_equal=len(same) - len(differing) - len(different_values),
    )


class _Running:
    """The largest difference in those slabs of one tensor that were compared so far."""

    def __init__(self) -> None:
        self.num_elements = self.num_different = 0
        self._absolute = self._relative = 0.0

    def add(self, first: torch.Tensor, second: torch.Tensor) -> None:
        self.num_elements += first.numel()
        unequal = (_bits(first) != _bits(second)).view(-1, first.element_size()).any(dim=1)
        count = int(unequal.sum())
        if not count:
            return
        self.num_different += count
        # Only elements that differ are widened: the others would cost eight bytes each.
        a, b = (_wide(tensor.reshape(-1)[unequal]) for tensor in (first, second))
        absolute = (a - b).abs()
        largest = torch.maximum(a.abs(), b.abs())
        relative = torch.where(absolute == 0, 0.0, absolute / largest)
        # NaNs in both, with different bits, are no difference in value: they compute alike.
        both_nan = a.isnan() & b.isnan()
        for name, found in (("_absolute", absolute), ("_relative", relative)):
            found = found.masked_fill(both_nan, 0.0).nan_to_num(nan=float("inf"), posinf=float("inf"))
            setattr(self, name, max(getattr(self, name), float(found.max())))

    def result(self, key: str) -> TensorDifference:
        return TensorDifference(
            key=key,
            num_elements=self.num_elements,
            num_different=self.num_different,
            max_absolute=self._absolute,
            max_relative=self._relative,
        )


def _different_trees(first: OpenCheckpoint, second: OpenCheckpoint, told: Set[str]) -> set[str]:
    """The keys of containers without tensors that differ although no entry below them does.

    Args:
        told: Keys of entries that are known to differ; containers above them are left out, or each would be told twice.
    """
    # Stock tools record no containers: whether those of a foreign checkpoint are the same, nobody knows.
    if first.manifest is None or second.manifest is None:
        return set()
    paths = [opened.chunks[key][0].path for opened in (first, second) for key in told & opened.chunks.keys()]
    # As text: the path of an entry has "1" where that of a container has the int.
    above = {tuple(map(str, path[:length])) for path in paths for length in range(len(path))}
    rows = {**second.trees, **first.trees}
    return {
        key
        for key in rows
        if (key not in first.trees or key not in second.trees or first.trees[key].value != second.trees[key].value)
        and tuple(map(str, rows[key].path)) not in above
    }


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _describe(opened: OpenCheckpoint, key: str) -> str:
    chunk = opened.chunks[key][0]
    return "value" if chunk.dtype is None else f"{chunk.dtype}{list(chunk.shape)}"


def _same_value(
    first_storage: Storage, first: OpenCheckpoint, second_storage: Storage, second: OpenCheckpoint, key: str
) -> bool:
    one, other = first.chunks[key][0], second.chunks[key][0]
    if one.value is not None and other.value is not None:
        return one.value == other.value
    a, b = value_of(first_storage, first.path, one), value_of(second_storage, second.path, other)
    return type(a) is type(b) and _comparable(a, key) == _comparable(b, key)


def _comparable(value: Any, key: str) -> str:
    # Encoded if possible: the `repr` of a large tensor or array leaves out most of it.
    try:
        return values.encode(value, key)
    except UnsupportedState:
        return repr(value)
