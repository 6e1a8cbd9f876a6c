"""What a pickle would make of little: looked for in its instructions, none of which is followed. Pure.

A pickle may use an object many times, and so write a tuple of two tuples of two tuples: sixty levels take 300 bytes,
and as a dict key 2**60 steps to hash. torch's own reader, given `weights_only=True`, makes such a key. It also calls
what it knows with any arguments: `bytearray(1 << 40)`; `torch.Tensor(1000)`, which is whatever lies in the memory of
this process; an encoder that doubles its text, forty times over. So here calls are held to those that `torch.save`
writes.
"""

from __future__ import annotations

import pickletools
import re
from collections import defaultdict
from typing import NamedTuple

MAX_UNFOLDED = 1 << 20
MAX_DEPTH = 200
# Of integers with one hash, of which a dict or set compares each with each.
MAX_EQUAL_HASHES = 1000
_HASH_MODULUS = 2**61 - 1
# An empty list is one byte of a pickle, and 64 in memory.
_MIN_CONTAINER_BYTES = 16
_FREE_CONTAINERS = 1 << 20
_MAX_REPEATED_TEXT = 64

_CONTAINERS = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
_ENCODE = "_codecs encode"
_REBUILD_SUBCLASS = "torch._tensor _rebuild_from_type_v2"
# These give a tensor the storage that was read for it, and refuse one that is too small.
_REBUILDS = frozenset(
    f"torch._utils {name}"
    for name in (
        "_rebuild_tensor",
        "_rebuild_tensor_v2",
        "_rebuild_tensor_v3",
        "_rebuild_parameter",
        "_rebuild_parameter_with_state",
        "_rebuild_sparse_tensor",
        "_rebuild_meta_tensor_no_storage",
    )
)
# These are as large as what they are given.
_COPIES = frozenset(
    {
        "__builtin__ complex",
        "__builtin__ set",
        "builtins complex",
        "builtins set",
        "collections Counter",
        "torch Size",
        "torch device",
        "torch.serialization _get_layout",
    }
)
_BYTEARRAYS = frozenset({"__builtin__ bytearray", "builtins bytearray"})
# Other names are for torch to refuse, if the user has not told it to know them; it is told to know those of DTensors.
_FOR_TORCH_TO_JUDGE = re.compile(r"(?!(__builtin__|builtins|_codecs|collections|torch(?!\.distributed\.)(\..*)?) )")


class _Folded(NamedTuple):
    """What is known of an object: how many objects it is, and how deep they lie in each other.

    `name` is that of a function or class; `text` the text that it is; `made_by` the name of what was called for it;
    `items` are those of a tuple; `is_again` says that it was made before, and is used once more.
    """

    size: int = 1
    depth: int = 1
    name: str | None = None
    text: str | None = None
    made_by: str | None = None
    items: tuple[_Folded, ...] | None = None
    is_again: bool = False

    @property
    def is_small(self) -> bool:
        """Whether it may be copied as often as a pickle likes."""
        return not self.is_again or (self.text is not None and len(self.text) <= _MAX_REPEATED_TEXT)


_LEAF, _MARK = _Folded(), _Folded(0, 0)


def folding_problem(pickled: bytes) -> str | None:
    """Why a pickle is not to be opened by torch; `None` if what it makes is in proportion to it."""
    stack: list[_Folded] = []
    memo: dict[int, _Folded] = {}
    containers, most = 0, _FREE_CONTAINERS + len(pickled) // _MIN_CONTAINER_BYTES
    hashes: dict[int, set[int]] = defaultdict(set)
    try:
        for code, argument, _ in pickletools.genops(pickled):
            if code.name in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[int(str(argument))]._replace(is_again=True))
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
                    made = _Folded(name=str(argument))
                elif code.name in ("BINUNICODE", "SHORT_BINUNICODE"):
                    made = _Folded(text=str(argument))
                elif code.name in ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
                    made = _tuple_of(taken)
                elif code.name in ("REDUCE", "NEWOBJ"):
                    arguments, function = taken
                    problem = _call_problem(code.name, function.name, arguments)
                    if problem is not None:
                        return problem
                    made = _Folded(made_by=function.name)
                elif code.name.startswith("LONG") and type(argument) is int and abs(argument) >= _HASH_MODULUS:
                    equal = hashes[hash(argument)]
                    equal.add(argument)
                    if len(equal) > MAX_EQUAL_HASHES:
                        return f"more than {MAX_EQUAL_HASHES} numbers in its pickle have one hash"
                if made.size > MAX_UNFOLDED or made.depth > MAX_DEPTH:
                    return f"a tuple in its pickle unfolds to {made.size:,} objects, {made.depth:,} deep"
                containers += code.name in _CONTAINERS
                if containers > most:
                    return f"its pickle makes more than {most:,} lists, dicts and tuples in {len(pickled):,} bytes"
                stack += [made] * len(code.stack_after)
    except (IndexError, KeyError, ValueError) as error:
        return f"its pickle can't be read: {type(error).__name__}: {error}"
    return None


def _call_problem(instruction: str, name: str | None, arguments: _Folded) -> str | None:
    """Why a call is none that `torch.save` writes, or none whose result is as large as what it is given."""
    items = arguments.items
    if name is None or items is None or arguments.is_again:
        return "its pickle calls what is no name, or with arguments that it used before"
    if name in _REBUILDS:
        fine = instruction == "REDUCE"
    elif name == _REBUILD_SUBCLASS:
        fine = bool(items) and items[0].name in _REBUILDS
    elif name in _COPIES:
        # A large one that is copied again and again is as good as a larger one.
        fine = all(item.is_small for item in items)
    elif name == _ENCODE:
        # In Latin 1 it is what it was, and twice that at most.
        fine = len(items) == 2 and items[0].text is not None and items[0].is_small and items[1].text == "latin1"
    elif name in _BYTEARRAYS:
        fine = not items or (len(items) == 1 and items[0].made_by == _ENCODE and items[0].is_small)
    elif name == "collections OrderedDict":
        fine = not items
    else:
        fine = _FOR_TORCH_TO_JUDGE.match(name) is not None
    return None if fine else f"its pickle calls {name!r} in a way that torch.save does not"


def _take(stack: list[_Folded], code: pickletools.OpcodeInfo) -> list[_Folded]:
    """Take what an instruction takes, the last first: so many objects, or all that were put there since a mark."""
    taken: list[_Folded] = []
    if pickletools.markobject in code.stack_before:
        while stack[-1] is not _MARK:
            taken.append(stack.pop())
        stack.pop()
        # What lies below the mark: the container that they go into.
        below = code.stack_before.index(pickletools.markobject)
    else:
        below = len(code.stack_before)
    for _ in range(below):
        taken.append(stack.pop())
    return taken


def _tuple_of(items: list[_Folded]) -> _Folded:
    size, depth = 1 + sum(item.size for item in items), 1 + max((item.depth for item in items), default=0)
    return _Folded(size, depth, items=tuple(reversed(items)))
