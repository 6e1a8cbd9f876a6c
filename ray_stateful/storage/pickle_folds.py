"""Finds small pickles that would make large objects, from their instructions, without executing any. Pure.

A pickle may use an object many times, and so write a tuple of two tuples of two tuples: sixty levels take 300 bytes,
and as a dict key 2**60 steps to hash. torch's own reader, given `weights_only=True`, makes such a key. It also calls
the functions it allows with any arguments: `bytearray(1 << 40)`; `torch.Tensor(1000)`, which is whatever lies in the
memory of this process; an encoder that doubles its text, forty times over; a sparse tensor whose indices nobody
compares with its size. So only those calls are accepted that `torch.save` writes, and whose result is in proportion to
their arguments.
"""

from __future__ import annotations

import pickletools
import re
from collections import Counter
from typing import Any, NamedTuple

MAX_UNFOLDED = 1 << 20
# Objects that are used again are walked again where they are keys: at most this many of them per byte of a pickle.
_UNFOLDED_A_BYTE = 16
MAX_DEPTH = 200
# The most numbers, or tuples of them, with the same hash: a dict or set compares each of them with every other.
MAX_EQUAL_HASHES = 1000
# An empty list takes one byte in a pickle, and 64 in memory.
_MIN_CONTAINER_BYTES = 16
_FREE_CONTAINERS = 1 << 20
_MAX_REPEATED_TEXT = 64

_CONTAINERS = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_ENCODE = "_codecs encode"
_SIZE = "torch Size"
_REBUILD_SUBCLASS = "torch._tensor _rebuild_from_type_v2"
# These give a tensor the storage that was read for it, and refuse a storage that is too small.
_REBUILDS = frozenset(
    f"torch._utils {name}"
    for name in (
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_meta_tensor_no_storage",
    )
)
_COMPLEX = frozenset({"__builtin__ complex", "builtins complex"})
# The results of these are as large as their arguments.
_COPIES = _COMPLEX | frozenset(
    {
        "__builtin__ set",
        "builtins set",
        "collections Counter",
        "torch device",
        "torch.serialization _get_layout",
    }
)
_BYTEARRAYS = frozenset({"__builtin__ bytearray", "builtins bytearray"})
# Other names are left to torch, which refuses those that were not registered as safe globals; those of DTensors are.
# It also takes the names of Python 2, of which some lead to `collections`.
_FOR_TORCH_TO_JUDGE = re.compile(
    r"(?!(__builtin__|builtins|_codecs|collections|User(Dict|List|String)|torch(?!\.distributed\.)(\..*)?) )"
)


class _Hashed:
    """Stands for an object of a pickle, and has its hash; equal objects share one."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value

    def __hash__(self) -> int:
        return self.value


class _Folded(NamedTuple):
    """What is known about an object of a pickle: how many objects it unfolds to, and how deeply they are nested.

    `name` is that of a function or class; `text` and `number` are the object itself, if it is one; `made_by` is the
    name of the function whose result it is; `items` are those of a tuple; `hashed` stands for it if it may be a key;
    `is_again` says that it was made before, and is used once more.
    """

    size: int = 1
    depth: int = 1
    name: str | None = None
    text: str | None = None
    number: float | None = None
    made_by: str | None = None
    items: tuple[_Folded, ...] | None = None
    hashed: _Hashed | None = None
    is_again: bool = False

    @property
    def is_small(self) -> bool:
        """Whether copying it is harmless: it was not used before, or is a short text."""
        return not self.is_again or (self.text is not None and len(self.text) <= _MAX_REPEATED_TEXT)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LEAF, _MARK = _Folded(), _Folded(0, 0)


class _Keys:
    """The objects of a pickle that may be keys of a dict, or in a set."""

    def __init__(self) -> None:
        self._known: dict[Any, _Hashed] = {}
        self._hashes: Counter[int] = Counter()

    def add(self, key: Any, hashed: int | None = None) -> _Hashed:
        """What stands for the object `key`; or, if `hashed` is given, for an object made of `key`, with this hash.

        Raises:
            ValueError: too many different objects have the same hash.
        """
        if key not in self._known:
            one = self._known[key] = _Hashed(hash(key) if hashed is None else hashed)
            self._hashes[one.value] += 1
            if self._hashes[one.value] > MAX_EQUAL_HASHES:
                raise ValueError(f"more than {MAX_EQUAL_HASHES} numbers or tuples have one hash")
        return self._known[key]

    def made(self, name: str, arguments: _Folded) -> _Hashed | None:
        """What stands for the result of a call, the same for equal calls; `None` if it can't be a key."""
        items = arguments.items or ()
        numbers = [item.number for item in items if item.number is not None]
        if name in _COMPLEX and len(items) == len(numbers) == 2:
            return self.add(complex(*numbers))
        if name == _SIZE:
            # A `torch.Size` is a tuple, and hashed as one.
            return items[0].hashed
        return None if arguments.hashed is None else self.add((name, arguments.hashed))


def folding_problem(pickled: bytes) -> str | None:
    """Why a pickle must not be opened by torch; `None` if what it makes is in proportion to its size."""
    stack: list[_Folded] = []
    memo: dict[int, _Folded] = {}
    containers, most = 0, _FREE_CONTAINERS + len(pickled) // _MIN_CONTAINER_BYTES
    again, most_again = 0, MAX_UNFOLDED + _UNFOLDED_A_BYTE * len(pickled)
    keys = _Keys()
    try:
        for code, argument, _ in pickletools.genops(pickled):
            if code.name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[int(str(argument))]._replace(is_again=True))
                again += stack[-1].size
            elif code.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[int(str(argument))] = stack[-1]
            elif code.name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif code.name == "MARK":
                stack.append(_MARK)
            else:
                taken = _take(stack, code)
                made = _LEAF
                if code.name == "GLOBAL":
                    made = _Folded(name=str(argument), hashed=keys.add((argument,)))
                elif code.name in ("BINUNICODE", "SHORT_BINUNICODE"):
                    made = _Folded(text=str(argument), hashed=keys.add(argument))
                elif type(argument) in (int, float, str, bytes):
                    number = argument if isinstance(argument, int | float) else None
                    made = _Folded(number=number, hashed=keys.add(argument))
                elif code.name in _CONSTANTS:
                    made = _Folded(hashed=keys.add(_CONSTANTS[code.name]))
                elif code.name in ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
                    made = _tuple_of(taken, keys)
                elif code.name in ("REDUCE", "NEWOBJ"):
                    arguments, function = taken
                    problem = _call_problem(code.name, function.name, arguments)
                    if problem is not None:
                        return problem
                    made = _Folded(made_by=function.name, hashed=keys.made(str(function.name), arguments))
                elif code.name == "BINPERSID":
                    made = _Folded(hashed=keys.made(code.name, taken[0]))
                if made.size > MAX_UNFOLDED or made.depth > MAX_DEPTH or again > most_again:
                    return f"a tuple in its pickle unfolds to {max(made.size, again):,} objects, {made.depth:,} deep"
                containers += code.name in _CONTAINERS
                if containers > most:
                    return f"its pickle makes more than {most:,} lists, dicts and tuples in {len(pickled):,} bytes"
                stack += [made] * len(code.stack_after)
    except (ArithmeticError, IndexError, KeyError, TypeError, ValueError) as error:
        return f"its pickle can't be read: {type(error).__name__}: {error}"
    return None


def _call_problem(instruction: str, name: str | None, arguments: _Folded) -> str | None:
    """Why a call is refused: `torch.save` writes no such call, or its result may be larger than its arguments.

    `None` if it is accepted.
    """
    items = arguments.items
    if name is None or items is None or arguments.is_again:
        return "its pickle calls what is no name, or with arguments that it used before"
    if name in _REBUILDS:
        fine = instruction == "REDUCE"
    elif name == _REBUILD_SUBCLASS:
        fine = bool(items) and items[0].name in _REBUILDS
    elif name in _COPIES:
        # Copying a large object again and again takes as much memory as a larger one.
        fine = all(item.is_small for item in items)
    elif name == _SIZE:
        fine = len(items) == 1 and items[0].items is not None and items[0].is_small
    elif name == _ENCODE:
        # As Latin 1, a text takes no more bytes than in the pickle, which has it as UTF-8.
        fine = len(items) == 2 and items[0].text is not None and items[0].is_small and items[1].text == "latin1"
    elif name in _BYTEARRAYS:
        fine = not items or (len(items) == 1 and items[0].made_by == _ENCODE and items[0].is_small)
    elif name == "collections OrderedDict":
        fine = not items
    else:
        fine = _FOR_TORCH_TO_JUDGE.match(name) is not None
    return None if fine else f"its pickle calls {name!r} in a way that torch.save does not"


def _take(stack: list[_Folded], code: pickletools.OpcodeInfo) -> list[_Folded]:
    """Pop what an instruction takes, last object first: a fixed number, or all that were pushed since a mark."""
    taken: list[_Folded] = []
    if pickletools.markobject in code.stack_before:
        while stack[-1] is not _MARK:
            taken.append(stack.pop())
        stack.pop()
        # An instruction may also take what lies below the mark: the container that the objects go into.
        below = code.stack_before.index(pickletools.markobject)
    else:
        below = len(code.stack_before)
    for _ in range(below):
        taken.append(stack.pop())
    return taken


def _tuple_of(taken: list[_Folded], keys: _Keys) -> _Folded:
    items = tuple(reversed(taken))
    size, depth = 1 + sum(item.size for item in items), 1 + max((item.depth for item in items), default=0)
    key = tuple(item.hashed for item in items)
    # A tuple with an item that can't be a key, such as a list, is no key itself.
    return _Folded(size, depth, items=items, hashed=None if None in key else keys.add(key, hash(key)))
