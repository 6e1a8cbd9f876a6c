"""JSON from a stranger: one meaning, or none.

Python's reader takes the last of two equal keys where another takes the first, accepts `NaN`, and ends a deep nesting
with a RecursionError. Pure.
"""

from __future__ import annotations

import json
from typing import Any


def strict_json(data: bytes | str) -> Any:
    """The value of a JSON text, in UTF-8 if it is bytes.

    Raises:
        ValueError: it is no JSON, is nested without end, or has a key twice in one object.
    """
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested without end") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
