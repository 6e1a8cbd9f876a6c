"""Values that are not tensors, as JSON: what pickle would otherwise be needed for.

JSON's own types stand for themselves. Everything else is an object with one key that starts with `$`, its tag:

    {"$tuple": [1, 2]}   {"$set": [..]}   {"$frozenset": [..]}   {"$bytes": base64}   {"$float": "nan"}
    {"$complex": [re, im]}   {"$dict": [[key, value], ..]}   {"$ordered_dict": [..]}   {"$counter": [..]}
    {"$numpy": [dtype, base64]}   {"$ndarray": [dtype, shape, base64]}   {"$tensor": [dtype, shape, base64]}
    {"$dtype": "float32"}   {"$size": [2, 3]}   {"$device": "cuda:0"}

Decoding builds these types and no others, so a stranger's checkpoint can't name types of its own.
"""

from __future__ import annotations

import base64
import json
import math
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_stateful.errors import HostileCheckpoint, UnsupportedState
from ray_stateful.format.dtypes import ITEM_BYTES, dtype_name
from ray_stateful.format.strict_json import check_containers, strict_json

if TYPE_CHECKING:
    import torch

MAX_DEPTH = 64
MAX_EMPTY_STRINGS = 1 << 20
MAX_EQUAL_HASHES = 1000
# A unit of time may have a multiplier, which must not be 0: numpy divides by it.
_PLAIN_DTYPE = re.compile(r"[<>|=][biufcmMSUV][0-9]{1,9}(\[([1-9][0-9]{0,8})?[a-zA-Z]{1,2}\])?")
_MIN_LIST_BYTES = 6  # [1,2], and a comma
_SPLIT_CHARACTER = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_ADVICE = (
    "give the part a state_dict() of numbers, strings, bytes, lists, tuples, dicts, sets, numpy values and tensors, "
    "and rebuild the rest in load_state_dict()"
)


def encode(value: Any, key: str) -> str:
    """`value` as JSON text.

    Raises:
        UnsupportedState: a value within it has no encoding; names the key and the path to that value.
    """
    # A fast path: most values are hyperparameters, single numbers that are stored with every parameter.
    kind = type(value)
    if kind is float and math.isfinite(value):
        return float.__repr__(value)
    if value is None or kind is bool:
        return _CONSTANTS[value]
    try:
        text = _ENCODER.encode(_encode(value, key, 0))
    except ValueError as error:
        # Python writes no int of more than 4,300 digits: reading one takes time that grows with the square of these.
        raise UnsupportedState(key, f"a number of too many digits ({error})", "store it as bytes") from error
    try:
        check_containers(text, _MIN_LIST_BYTES)
    except ValueError as error:
        raise UnsupportedState(key, f"a value of {error}", "store it as a tensor") from error
    return text


def decode(text: str, where: str) -> Any:
    """The value that `text` encodes.

    Raises:
        HostileCheckpoint: `text` is not what `encode` makes.
    """
    if text in _DECODED_CONSTANTS:
        return _DECODED_CONSTANTS[text]
    try:
        return json.loads(text) if _NUMBER.fullmatch(text) else _decode(strict_json(text, _MIN_LIST_BYTES), 0)
    # What numpy, torch and base64 raise for arguments that they do not accept.
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise HostileCheckpoint(where, f"a value is not in the encoding of this format: {error}") from error


def _encode(value: Any, key: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise UnsupportedState(key, f"a value nested deeper than {MAX_DEPTH} levels", "flatten it")
    kind = type(value)
    # By exact type: an IntEnum is an int and a numpy float64 a float, but each would come back as the plain type.
    if value is None or kind in (bool, int):
        return value
    if kind is str:
        return _checked_text(value, key)
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if kind is list:
        return [_encode(item, f"{key}[{n}]", depth + 1) for n, item in enumerate(value)]
    if kind is dict and all(type(k) is str and not k.startswith("$") for k in value):
        return {_checked_text(k, key): _encode(item, f"{key}.{k}", depth + 1) for k, item in value.items()}
    encoder = _ENCODERS.get(kind) or (_encode_torch if kind.__module__.startswith("torch") else None)
    if isinstance(value, np.generic):
        encoder = _encode_numpy_scalar
    tagged = None if encoder is None else encoder(value, key, depth + 1)
    if tagged is None:
        raise UnsupportedState(key, f"a value of type {kind.__module__}.{kind.__qualname__}", _ADVICE)
    return tagged


def _checked_text(text: str, key: str) -> str:
    # JSON spells a character and its two surrogate halves alike, and reads back the character. A lone half is kept.
    if _SPLIT_CHARACTER.search(text) is not None:
        raise UnsupportedState(key, f"the text {text[:40]!a}, with a character in two halves,", "store it as bytes")
    return text


def _items(tag: str) -> Callable[[Any, str, int], Any]:
    return lambda value, key, depth: {tag: [_encode(item, f"{key}[{n}]", depth) for n, item in enumerate(value)]}


def _pairs(tag: str) -> Callable[[Any, str, int], Any]:
    return lambda value, key, depth: {
        tag: [[_encode(k, f"{key} key", depth), _encode(item, f"{key}[{k!r}]", depth)] for k, item in value.items()]
    }


def _sorted_items(tag: str) -> Callable[[Any, str, int], Any]:
    # A set has no order, and two checkpoints of one state must be equal byte for byte.
    return lambda value, key, depth: {
        tag: sorted((_encode(item, f"{key} item", depth) for item in value), key=lambda item: json.dumps(item))
    }


def _encode_numpy_scalar(value: Any, key: str, depth: int) -> Any:
    if not _has_plain_dtype(value):
        return None
    # As an array of one: an empty string scalar has an itemsize of 0, and yet its tobytes() returns bytes.
    one = np.array([value])
    if isinstance(value, np.character) and one[0] != value:
        # numpy drops trailing zeros of texts and bytes.
        return None
    return {"$numpy": [one.dtype.str, _text(one.tobytes())]}


def _encode_ndarray(value: Any, key: str, depth: int) -> Any:
    if not _has_plain_dtype(value):
        return None
    return {"$ndarray": [value.dtype.str, list(value.shape), _text(np.ascontiguousarray(value).tobytes())]}


def _has_plain_dtype(value: Any) -> bool:
    # A dtype of another package (bfloat16 of ml_dtypes) is spelled as a number of bytes, and would come back as those.
    dtype = value.dtype
    return not dtype.hasobject and dtype.names is None and np.dtype(dtype.str) == dtype


def _encode_torch(value: Any, key: str, depth: int) -> Any:
    import torch

    if type(value) is torch.Size:
        return {"$size": list(value)}
    if type(value) is torch.dtype and dtype_name(value) in ITEM_BYTES:
        return {"$dtype": dtype_name(value)}
    if type(value) is torch.device:
        return {"$device": str(value)}
    if type(value) is torch.Tensor and is_dense(value) and dtype_name(value.dtype) in ITEM_BYTES:
        flat = value.detach().cpu().resolve_conj().resolve_neg().contiguous().as_strided((value.numel(),), (1,))
        return {
            "$tensor": [dtype_name(value.dtype), list(value.shape), _text(flat.view(torch.uint8).numpy().tobytes())]
        }
    return None


_CONSTANTS = {None: "null", True: "true", False: "false"}
_DECODED_CONSTANTS = {text: value for value, text in _CONSTANTS.items()}
_NUMBER = re.compile(r"-?[0-9][0-9.eE+-]*")
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)

_ENCODERS: dict[type, Callable[[Any, str, int], Any]] = {
    Counter: _pairs("$counter"),
    OrderedDict: _pairs("$ordered_dict"),
    bytes: lambda value, key, depth: {"$bytes": _text(value)},
    complex: lambda value, key, depth: {"$complex": [repr(value.real), repr(value.imag)]},
    dict: _pairs("$dict"),
    float: lambda value, key, depth: {"$float": repr(value)},
    frozenset: _sorted_items("$frozenset"),
    np.ndarray: _encode_ndarray,
    set: _sorted_items("$set"),
    tuple: _items("$tuple"),
}


def _decode(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH + 1:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list):
        return [_decode(item, depth + 1) for item in value]
    if not isinstance(value, Mapping):
        return value
    tag = next((key for key in value if key.startswith("$")), None)
    if tag is None:
        return {key: _decode(item, depth + 1) for key, item in value.items()}
    if len(value) != 1 or tag not in _DECODERS:
        raise ValueError(f"unknown tag {tag!r}")
    return _DECODERS[tag](value[tag], depth + 1)


def _list(value: Any, depth: int) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"a list was expected, not {type(value).__name__}")
    return [_decode(item, depth) for item in value]


def _members(value: Any, depth: int) -> list[Any]:
    return _distinguishable(_list(value, depth))


def _distinguishable(keys: list[Any]) -> list[Any]:
    # Numbers, and tuples of them, can be chosen so that a dict or a set has to compare each key with each other.
    counts = Counter(hash(key) for key in keys if type(key) is not str)
    if counts and max(counts.values()) > MAX_EQUAL_HASHES:
        raise ValueError(f"more than {MAX_EQUAL_HASHES} keys have one hash")
    # If the keys are sets of such numbers, each comparison of two keys takes as many comparisons again.
    if counts and max(counts.values()) > 1 and _comparisons(keys) > MAX_EQUAL_HASHES * sum(map(_num_leaves, keys)):
        raise ValueError("keys of one hash are sets of values of one hash")
    return keys


def _comparisons(keys: Collection[Any]) -> int:
    """How many comparisons it may take to look up each of `keys` in a hash table of them."""
    counts = Counter(map(hash, keys))
    return sum(counts[hash(key)] * _comparisons_of(key) for key in keys)


def _comparisons_of(key: Any) -> int:
    if type(key) is frozenset:
        return _comparisons(key)
    return sum(map(_comparisons_of, key)) + 1 if isinstance(key, tuple) else 1


def _num_leaves(key: Any) -> int:
    return sum(map(_num_leaves, key)) + 1 if isinstance(key, tuple | frozenset) else 1


def _mapping(value: Any, depth: int) -> list[tuple[Any, Any]]:
    pairs = [(_decode(key, depth), _decode(item, depth)) for key, item in _given(value, list)]
    _distinguishable([key for key, _ in pairs])
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a dict has a key twice")
    return pairs


def _given(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise TypeError(f"a {kinds[0].__name__} was expected, not a {type(value).__name__}")
    return value


def _decode_numpy(given: Any, depth: int) -> Any:
    dtype, data = _given(given, list)
    array = _array(dtype, [1], data)
    return array[0]


def _decode_complex(given: Any, depth: int) -> complex:
    real, imaginary = _given(given, list)
    return complex(float(_given(real, str)), float(_given(imaginary, str)))


def _decode_tensor(given: Any, depth: int) -> torch.Tensor:
    import torch

    name, shape, data = _given(given, list)
    raw = base64.b64decode(data, validate=True)
    _check_size(shape, ITEM_BYTES[name], len(raw))
    flat = (
        torch.frombuffer(bytearray(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8, device="cpu")
    )
    return flat.view(getattr(torch, name)).reshape(shape)


def _decode_dtype(name: Any, depth: int) -> torch.dtype:
    import torch

    if _given(name, str) not in ITEM_BYTES:
        raise ValueError(f"unknown dtype {name!r}")
    return getattr(torch, name)  # type: ignore[no-any-return]  # a name of ITEM_BYTES is a dtype


def _decode_size(given: Any, depth: int) -> torch.Size:
    import torch

    sizes = [_given(size, int) for size in _given(given, list)]
    if any(abs(size) >= 2**62 for size in sizes):
        raise OverflowError("a size beyond 64 bits")
    return torch.Size(sizes)


def _decode_device(name: Any, depth: int) -> torch.device:
    import torch

    return torch.device(_given(name, str))


_DECODERS: dict[str, Callable[[Any, int], Any]] = {
    "$bytes": lambda data, depth: base64.b64decode(data, validate=True),
    "$complex": _decode_complex,
    "$counter": lambda pairs, depth: Counter(dict(_mapping(pairs, depth))),
    "$device": _decode_device,
    "$dict": lambda pairs, depth: dict(_mapping(pairs, depth)),
    "$dtype": _decode_dtype,
    "$float": lambda text, depth: float(_given(text, str)),
    "$frozenset": lambda items, depth: frozenset(_members(items, depth)),
    "$ndarray": lambda given, depth: _array(*_given(given, list)),
    "$numpy": _decode_numpy,
    "$ordered_dict": lambda pairs, depth: OrderedDict(_mapping(pairs, depth)),
    "$set": lambda items, depth: set(_members(items, depth)),
    "$size": _decode_size,
    "$tensor": _decode_tensor,
    "$tuple": lambda items, depth: tuple(_list(items, depth)),
}


def _array(dtype: str, shape: list[int], data: str) -> Any:
    # Only a plain element type: `np.dtype` also takes lists, dicts and a grammar of records and sub-arrays.
    if _PLAIN_DTYPE.fullmatch(_given(dtype, str)) is None:
        raise ValueError(f"array of dtype {dtype[:40]!r}")
    parsed = np.dtype(dtype)
    if parsed.hasobject or parsed.names is not None:
        raise ValueError(f"array of dtype {dtype!r}")
    raw = base64.b64decode(data, validate=True)
    _check_size(shape, parsed.itemsize, len(raw))
    if not parsed.itemsize:
        # Empty strings: there are no bytes to make an array from.
        return np.zeros(_bounded(shape), dtype=parsed)
    if parsed.kind == "U" and (np.frombuffer(raw, dtype=f"{parsed.byteorder}u4") > sys.maxunicode).any():
        # numpy looks at the characters only when an element is read, which then ends in a SystemError.
        raise ValueError("a text with characters that do not exist")
    return np.frombuffer(bytearray(raw), dtype=parsed).reshape(shape)


def _bounded(shape: list[int]) -> list[int]:
    if math.prod(shape) > MAX_EMPTY_STRINGS:
        raise ValueError(f"an array of {math.prod(shape):,} empty strings")
    return shape


def _check_size(shape: Any, item_bytes: int, num_bytes: int) -> None:
    sized = all(type(size) is int and size >= 0 for size in _given(shape, list)) and len(shape) <= MAX_DEPTH
    if not sized or math.prod(shape) * item_bytes != num_bytes:
        raise ValueError(f"shape {shape} does not fit {num_bytes} bytes")


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor consists of its shape, its dtype and the bytes of its elements, and nothing else."""
    import torch

    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested or tensor.is_meta)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
