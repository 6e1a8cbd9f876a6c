"""Finds small pickles that would make large objects, from their instructions, without executing any. Pure.

A pickle may use an object many times, and so write a tuple of two tuples of two tuples: sixty levels take 300 bytes,
and as a dict key 2**60 steps to hash. torch's own reader, given `weights_only=True`, makes such a key. It also calls
the functions it allows with any arguments: `bytearray(1 << 40)`; `torch.Tensor(1000)`, which is whatever lies in the
memory of this process; an encoder that doubles its text, forty times over; a sparse tensor whose indices nobody
compares with its size. So only those calls are accepted that `torch.save` writes, and whose result is in proportion to
their arguments.

A tensor is whatever its storage is. So that is one which was read from the file, and no larger than what lies there;
nothing but an OrderedDict is changed by BUILD, as a tensor would get another storage by that.
"""

from __future__ import annotations

import pickletools
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.stock_item import STORAGES

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
_MAX_NAMES = 1000

_CONTAINERS = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
# What torch.save writes; torch's reader knows one more, of Python 2.
_INSTRUCTIONS = frozenset(
    {
        *_CONTAINERS,
        *("APPEND", "APPENDS", "BINFLOAT", "BINGET", "BININT", "BININT1", "BININT2", "BINPERSID", "BINPUT"),
        *("BINUNICODE", "BUILD", "EMPTY_TUPLE", "GLOBAL", "LONG1", "LONG_BINGET", "LONG_BINPUT", "MARK", "NEWFALSE"),
        *("NEWOBJ", "NEWTRUE", "NONE", "PROTO", "REDUCE", "SETITEM", "SETITEMS", "STOP"),
    }
)
_FILLS = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")
_ENCODE = "_codecs encode"
_ORDERED_DICT = "collections OrderedDict"
_SIZE = "torch Size"
_STORAGE = "BINPERSID"
_REBUILD_SUBCLASS = "torch._tensor _rebuild_from_type_v2"
# These give a tensor the storage that was read for it, and refuse a storage that is too small.
_OF_STORAGES = frozenset({"torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3"})
_OF_TENSORS = frozenset({"torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state"})
_REBUILDS = _OF_STORAGES | _OF_TENSORS | {"torch._utils _rebuild_meta_tensor_no_storage"}
# Bytes of an element, by the type of a storage.
_STORAGE_TYPES = {"torch.storage UntypedStorage": 1} | {
    f"torch {name}": ITEM_BYTES[dtype] for name, dtype in STORAGES.items()
}
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
# Other names are left to torch, which refuses those that were not registered as safe globals. Not torch's own, as those
# of DTensors are, and to make a DeviceMesh is a collective. torch also takes the names of Python 2, of which some lead
# to `collections`.
_FOR_TORCH_TO_JUDGE = re.compile(r"(?!(__builtin__|builtins|_codecs|collections|User(Dict|List|String)|torch(\..*)?) )")


class _Hashed:
    """Stands for an object of a pickle, and has its hash; equal objects share one."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value

    def __hash__(self) -> int:
        return self.value


class _Folded(NamedTuple):
    """What is known about an object of a pickle: how many objects it unfolds to, and how deeply they are nested.

    `name` is that of a function or class; `text` is the object itself, if it is one; `made_by` is the name of the
    function whose result it is; `items` are those of a tuple; `hashed` stands for it if it may be a key; `is_again`
    says that it was made before, and is used once more.
    """

    size: int = 1
    depth: int = 1
    name: str | None = None
    text: str | None = None
    made_by: str | None = None
    items: tuple[_Folded | _Number, ...] | None = None
    hashed: Any = None
    is_again: bool = False

    @property
    def is_small(self) -> bool:
        """Whether copying it is harmless: it was not used before, or is a short text."""
        return not self.is_again or (self.text is not None and len(self.text) <= _MAX_REPEATED_TEXT)

    @property
    def number(self) -> None:
        return None


class _Number:
    """Stands for a number as `_Folded` does; smaller, as there may be very many."""

    __slots__ = ("number",)

    size = depth = 1
    name = text = made_by = items = None
    is_again, is_small = False, True

    def __init__(self, number: float) -> None:
        self.number = number

    @property
    def hashed(self) -> float:
        return self.number


_Object = _Folded | _Number

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

    def made(self, name: str, arguments: _Object) -> Any:
        """What stands for the result of a call, the same for equal calls; `None` if it can't be a key."""
        items = arguments.items or ()
        numbers = [item.number for item in items if item.number is not None]
        if name in _COMPLEX and len(items) == len(numbers) == 2:
            return self.add(complex(*numbers))
        if name == _SIZE:
            # A `torch.Size` is a tuple, and hashed as one.
            return items[0].hashed
        return None if arguments.hashed is None else self.add((name, arguments.hashed))


def folding_problem(pickled: bytes, storages: Mapping[str, int]) -> str | None:
    """Why a pickle must not be opened by torch; `None` if what it makes is in proportion to its size.

    Args:
        storages: The sizes in bytes of the storages that lie beside it, by key.
    """
    stack: list[_Object] = []
    memo: dict[int, _Object] = {}
    # One object for all uses of each, as there may be very many uses.
    fetched: dict[int, _Object] = {}
    names: dict[str, _Folded] = {}
    keys = _Keys()
    constants = {name: _Folded(hashed=keys.add(value)) for name, value in _CONSTANTS.items()}
    constants["EMPTY_TUPLE"] = _Folded(items=(), hashed=keys.add(()))
    made_objects, most = 0, _FREE_CONTAINERS + len(pickled) // _MIN_CONTAINER_BYTES
    again, most_again = 0, MAX_UNFOLDED + _UNFOLDED_A_BYTE * len(pickled)
    try:
        for code, argument, _ in pickletools.genops(pickled):
            if code.name not in _INSTRUCTIONS:
                return f"its pickle has the instruction {code.name}, which torch.save does not write"
            if code.name in ("BINGET", "LONG_BINGET"):
                number = int(str(argument))
                if number not in fetched:
                    one = memo[number]
                    fetched[number] = one if isinstance(one, _Number) else one._replace(is_again=True)
                stack.append(fetched[number])
                again += stack[-1].size
            elif code.name in ("BINPUT", "LONG_BINPUT"):
                memo[int(str(argument))] = stack[-1]
                fetched.pop(int(str(argument)), None)
            elif code.name == "MARK":
                stack.append(_MARK)
            else:
                taken = _take(stack, code)
                made: _Object = _LEAF
                if code.name == "GLOBAL":
                    made = names.setdefault(str(argument), _Folded(name=str(argument), hashed=keys.add((argument,))))
                    if len(names) > _MAX_NAMES:
                        return f"its pickle has more than {_MAX_NAMES} names"
                elif code.name == "BINUNICODE":
                    # Nobody can choose the hash of a text, so it need not be counted.
                    made = _Folded(text=str(argument), hashed=argument)
                elif isinstance(argument, int | float) and code.name != "PROTO":
                    # There are few floats of one hash, and no two ints that are smaller than the modulus.
                    if isinstance(argument, int) and abs(argument) >= sys.hash_info.modulus:
                        keys.add(argument)
                    made = _Number(argument)
                elif code.name in constants:
                    made = constants[code.name]
                elif code.name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
                    made = _tuple_of(taken, keys)
                elif code.name in ("REDUCE", "NEWOBJ"):
                    arguments, function = taken
                    problem = _call_problem(code.name, function.name, arguments)
                    if problem is not None:
                        return problem
                    made = _Folded(made_by=function.name, hashed=keys.made(str(function.name), arguments))
                elif code.name == _STORAGE:
                    problem = _storage_problem(taken[0].items or (), storages)
                    if problem is not None:
                        return problem
                    made = _Folded(made_by=_STORAGE, hashed=keys.made(_STORAGE, taken[0]))
                elif code.name in _FILLS and taken[-1].made_by is not None:
                    made = _Folded(made_by=taken[-1].made_by)
                if code.name == "BUILD" and not _may_have_state(made.made_by):
                    return f"its pickle sets the state of what is no OrderedDict ({made.made_by})"
                if made.size > MAX_UNFOLDED or made.depth > MAX_DEPTH or again > most_again:
                    return f"a tuple in its pickle unfolds to {max(made.size, again):,} objects, {made.depth:,} deep"
                made_objects += code.name in _CONTAINERS or code.name in ("REDUCE", "NEWOBJ")
                if made_objects > most:
                    return f"its pickle makes more than {most:,} lists, dicts and tuples in {len(pickled):,} bytes"
                stack += [made] * len(code.stack_after)
    except (ArithmeticError, IndexError, KeyError, TypeError, ValueError) as error:
        return f"its pickle can't be read: {type(error).__name__}: {error}"
    return None


def _storage_problem(described: Sequence[_Object], storages: Mapping[str, int]) -> str | None:
    """Why a storage is refused: it is not read from the archive, or says that it has more bytes than lie there.

    Args:
        described: What torch.save writes of it: "storage", its type, its key, its device, and its number of elements.
    """
    if len(described) != 5:
        return "its pickle has a storage that torch.save does not write"
    key, number, item_bytes = described[2].text, described[4].number, _STORAGE_TYPES.get(described[1].name or "")
    if key not in storages or item_bytes is None or type(number) is not int or number < 0:
        return f"its pickle has a storage that torch.save does not write, {str(key)[:80]!a} of {number} elements"
    # torch takes the number as it is, and would read what comes after the storage in memory.
    if number * item_bytes > storages[key]:
        return f"storage {key!r} has {storages[key]:,} bytes, and not {number * item_bytes:,}"
    return None


def _may_have_state(made_by: str | None) -> bool:
    """Whether BUILD may change the result of this function; only `torch` knows the names that it was told of."""
    return made_by == _ORDERED_DICT or (made_by is not None and _FOR_TORCH_TO_JUDGE.match(made_by) is not None)


def _call_problem(instruction: str, name: str | None, arguments: _Object) -> str | None:
    """Why a call is refused: `torch.save` writes no such call, or its result may be larger than its arguments.

    `None` if it is accepted.
    """
    items = arguments.items
    if name is None or items is None or arguments.is_again:
        return "its pickle calls what is no name, or with arguments that it used before"
    if name in _OF_STORAGES or name in _OF_TENSORS:
        # The last of those that all of them have are hooks, of which torch.save writes none.
        of, num = ({_STORAGE}, 6) if name in _OF_STORAGES else (_REBUILDS | {_REBUILD_SUBCLASS}, 3)
        fine = instruction == "REDUCE" and len(items) >= num and items[0].made_by in of
        fine = fine and items[num - 1].made_by == _ORDERED_DICT
    elif name in _REBUILDS:
        fine = instruction == "REDUCE"
    elif name == _REBUILD_SUBCLASS:
        fine = instruction == "REDUCE" and len(items) == 4 and items[0].name in _REBUILDS
        if fine:
            return _call_problem(instruction, items[0].name, items[2])
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
    elif name == _ORDERED_DICT:
        fine = not items
    else:
        fine = _FOR_TORCH_TO_JUDGE.match(name) is not None
    return None if fine else f"its pickle calls {name!r} in a way that torch.save does not"


def _take(stack: list[_Object], code: pickletools.OpcodeInfo) -> list[_Object]:
    """Pop what an instruction takes, last object first: a fixed number, or all that were pushed since a mark."""
    taken: list[_Object] = []
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


def _tuple_of(taken: list[_Object], keys: _Keys) -> _Folded:
    items = tuple(reversed(taken))
    size, depth = 1 + sum(item.size for item in items), 1 + max((item.depth for item in items), default=0)
    key = tuple(item.hashed for item in items)
    # A tuple with an item that can't be a key, such as a list, is no key itself.
    return _Folded(size, depth, items=items, hashed=None if None in key else keys.add(key, hash(key)))
