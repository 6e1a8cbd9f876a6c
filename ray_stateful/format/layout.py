"""Names: of a checkpoint's directory and of the files in it. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

FORMAT_VERSION = 1

MANIFEST = "manifest.json"
INDEX = "index.arrow"
DCP_METADATA = ".metadata"

MAX_STEP = 9_999_999_999
_NAME = re.compile(r"checkpoint_s(?P<step>[0-9]{10})_(?P<attempt>[0-9a-f]{6,32})")
_RANK_KEY = re.compile(r"rank_(0|[1-9][0-9]{0,8})")
_ITEM_FILE = re.compile(r"__(?P<rank>[0-9]{1,9})_(?P<number>[0-9]{1,9})\.distcp")


@dataclass(frozen=True, slots=True, order=True)
class CheckpointName:
    """`checkpoint_s0000001200_9f3c21`: optimizer steps completed, and the attempt that wrote it.

    The attempt is random, so that no two saves share a directory: a name used twice mixes the shards of two
    worlds, and under `num_to_keep` deletes the live checkpoint.
    """

    step: int
    attempt: str

    def __str__(self) -> str:
        return f"checkpoint_s{self.step:010d}_{self.attempt}"


def parse_name(name: str) -> CheckpointName | None:
    """The parts of a checkpoint directory's name; `None` for any other, also one that merely starts like it."""
    match = _NAME.fullmatch(name)
    return None if match is None else CheckpointName(int(match["step"]), match["attempt"])


def rank_key(rank: int) -> str:
    """The step of a path under which the value of one rank is stored."""
    return f"rank_{rank}"


def is_rank_key(step: object) -> bool:
    """Whether `step` is one that `rank_key` makes."""
    return isinstance(step, str) and _RANK_KEY.fullmatch(step) is not None


def is_of_one_rank(path: Sequence[str | int]) -> bool:
    """Whether the value at `path`, whose first step is a part's name, belongs to a single rank."""
    return len(path) > 1 and is_rank_key(path[1])


def item_file(rank: int, number: int) -> str:
    """The name of the `number`-th item file of `rank`."""
    return f"__{rank}_{number}.distcp"


def is_item_file(name: str) -> bool:
    """Whether `name` is one that `item_file` makes."""
    return _ITEM_FILE.fullmatch(name) is not None


def writer_of(name: str) -> tuple[int, int]:
    """The rank and the number from which `item_file` made `name`."""
    match = _ITEM_FILE.fullmatch(name)
    assert match is not None, name
    return int(match["rank"]), int(match["number"])


def is_file_of_checkpoint(name: str) -> bool:
    """Whether `name` is one that a save gives a file."""
    return name in (MANIFEST, INDEX, DCP_METADATA) or is_item_file(name)
