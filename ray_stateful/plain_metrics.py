"""Metrics as Ray Train can store them: plain JSON values, or a refusal that names the metric. Pure; imports no ray.

Ray writes the metrics of every checkpoint into a JSON file, on its controller. A `numpy.float32` in them raises there,
and ends the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def plain_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """`metrics` with NumPy scalars and tensors of one value as Python numbers; NaN and infinities are floats.

    Raises:
        ValueError: a metric has a different kind of value; names the metric. Or `metrics` is not a mapping.
    """
    if not isinstance(metrics, Mapping):
        raise ValueError(f"metrics are a {type(metrics).__name__}; give a dict of numbers and strings by name")
    return {_key(key, "metrics"): _plain(value, str(key)) for key, value in metrics.items()}


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    # Subclasses too (`numpy.float64` is a float, `IntEnum` an int): JSON writers differ in how they write those.
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, str):
        return _text(value, where)
    if isinstance(value, Mapping):
        return {_key(key, where): _plain(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, f"{where}[{index}]") for index, inner in enumerate(value)]
    # A NumPy scalar, or a tensor or array without dims. Recognised by attributes: neither library need be imported.
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        scalar = value.item()
        if isinstance(scalar, bool | int | float | str):
            return _plain(scalar, where)
    what = f"{type(value).__module__}.{type(value).__qualname__}"
    shape = getattr(value, "shape", None)
    raise ValueError(
        f"metric {where!r} is a {what}{f' of shape {tuple(shape)}' if shape else ''}: Ray Train stores metrics as JSON;"
        " give a number, a string, or lists and dicts of those"
    )


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise ValueError(f"{where}: key {key!r} is a {type(key).__name__}; the keys of metrics are strings")
    return _text(key, where)


def _text(text: str, where: str) -> str:
    try:
        # As Ray does it, when the run has ended: half of a character (of a file's name, for example) is an error there.
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"metric {where!r}: the text {text!a} is not valid Unicode ({error.reason})") from error
    return str(text)
