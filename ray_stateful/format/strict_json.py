"""JSON from a stranger: one meaning, or none.

Python's reader takes the last of two equal keys where other readers take the first, accepts `NaN`, fails on deep
nesting with a RecursionError, and makes 64 bytes of each `[]`. Pure.
"""

from __future__ import annotations

import json
import re
from typing import Any

_FREE_CONTAINERS = 1 << 20
_TEXT = re.compile('"[^"]*"')


def strict_json(data: bytes | str, min_bytes: int) -> Any:
    """The value of a JSON text, in UTF-8 if it is bytes.

    Args:
        min_bytes: Length of text that must be there for each list and object beyond the first million.

    Raises:
        ValueError: it is not JSON, is nested too deeply, has a key twice in an object, or too many lists and objects.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    # Before any of them is built.
    check_containers(text, min_bytes)
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested without end") from None


def check_containers(text: str, min_bytes: int) -> None:
    """Refuse a JSON text with too many lists and objects for its length, as `strict_json` does.

    Raises:
        ValueError: it has too many.
    """
    most = _FREE_CONTAINERS + len(text) // min_bytes
    # Brackets within strings do not count; strings are taken out only if it matters.
    if _num_containers(text) > most and _num_containers(_without_texts(text)) > most:
        raise ValueError(f"more than {most:,} lists and objects")


def _num_containers(text: str) -> int:
    return text.count("[") + text.count("{")


def _without_texts(text: str) -> str:
    return _TEXT.sub("", text.replace("\\\\", "").replace('\\"', ""))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
