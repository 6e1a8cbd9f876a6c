"""Reads a pickle, doing only what is on a list, instead of whatever the pickle says.

A pickle is a program. Refusing names that it asks for is not enough: with the allowed types alone it can still set
attributes of a class for the whole process (BUILD on the class itself), make the reader allocate gigabytes for its memo
(LONG_BINPUT with a large index), or use a tuple of tuples of tuples as a dict key, whose hash takes for ever. So the
instructions are listed here too, and what they may be applied to. In Python, as pickle's C reader can't be restricted.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

# An empty list takes one byte in a pickle, and 64 in memory. A mark makes one, too, and remembering takes even more. So
# there may be only one of each for so many bytes, beyond the first. What DCP writes has one list or dict per 30 bytes,
# one mark per 40, remembers one object per 11, and has one per 5 bytes of any kind that is neither text nor number.
_FREE_OBJECTS = 1 << 18
_MIN_BYTES = {"list": 16, "mark": 16, "memory": 6, "object": 4}
# What functions return, in bytes of memory: a long path again and again. DCP's takes little more than its pickle.
_FREE_RESULT_BYTES, _RESULT_BYTES_A_BYTE = 16 << 20, 8
# The most keys with the same hash, not counting texts: their hashes can't be chosen, as they depend on a secret of the
# process.
MAX_EQUAL_HASHES = 1000

_INSTRUCTIONS = (
    pickle.APPEND,
    pickle.APPENDS,
    pickle.BINFLOAT,
    pickle.BINGET,
    pickle.BININT,
    pickle.BININT1,
    pickle.BININT2,
    pickle.BINPUT,
    pickle.BINUNICODE,
    pickle.BUILD,
    pickle.EMPTY_DICT,
    pickle.EMPTY_LIST,
    pickle.EMPTY_TUPLE,
    pickle.FRAME,
    pickle.GLOBAL,
    pickle.LONG1,
    pickle.LONG_BINGET,
    pickle.LONG_BINPUT,
    pickle.MARK,
    pickle.MEMOIZE,
    pickle.NEWFALSE,
    pickle.NEWOBJ,
    pickle.NEWTRUE,
    pickle.NONE,
    pickle.PROTO,
    pickle.REDUCE,
    pickle.SETITEM,
    pickle.SETITEMS,
    pickle.SHORT_BINUNICODE,
    pickle.STACK_GLOBAL,
    pickle.STOP,
    pickle.TUPLE,
    pickle.TUPLE1,
    pickle.TUPLE2,
    pickle.TUPLE3,
)


@dataclasses.dataclass(frozen=True, eq=False)
class _Name:
    """Stands for a function or class that a pickle names: it has no attributes that the pickle could set."""

    target: Any


# pickle's reader in Python: the one in C, which typeshed describes, has no table of instructions.
_Reader: Any = pickle._Unpickler


class StrictUnpickler(_Reader):  # type: ignore[misc]  # a base of type Any, see above
    """Reads one pickle of dataclasses and plain containers.

    Args:
        data: The pickle.
        values: Objects that the pickle may use as they are, by module and name.
        functions: Functions that it may call with any arguments, by module and name.
        classes: Dataclasses that it may make, setting their fields, by module and name; `__setstate__` is called if a
            class has one.
        is_key: Whether an object may be a dict key; called before the object is hashed.

    `load` raises `pickle.UnpicklingError` for what is not allowed, and may raise any exception for a damaged pickle.
    """

    def __init__(
        self,
        data: bytes,
        *,
        values: Mapping[tuple[str, str], Any],
        functions: Mapping[tuple[str, str], Callable[..., Any]],
        classes: Mapping[tuple[str, str], type],
        is_key: Callable[[Any], bool],
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._values, self._functions, self._classes, self._is_key = values, functions, classes, is_key
        self._hashes: Counter[int] = Counter()
        self._left = {kind: _FREE_OBJECTS + len(data) // size for kind, size in _MIN_BYTES.items()}
        self._left["result"] = _FREE_RESULT_BYTES + _RESULT_BYTES_A_BYTE * len(data)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._values:
            return self._values[module, name]
        for known in (self._functions, self._classes):
            if (module, name) in known:
                return _Name(known[module, name])
        raise pickle.UnpicklingError(f"asks for {module}.{name}, which is not on the list")

    def _load_reduce(self) -> None:
        self._count("object")
        arguments = self.stack.pop()
        function = self.stack[-1]
        if not isinstance(function, _Name) or function.target not in self._functions.values():
            raise pickle.UnpicklingError("calls what is not on the list")
        self.stack[-1] = function.target(*arguments)
        self._count("result", sys.getsizeof(self.stack[-1]))

    def _load_newobj(self) -> None:
        self._count("object")
        arguments = self.stack.pop()
        made = self.stack.pop()
        if arguments != () or not isinstance(made, _Name) or made.target not in self._classes.values():
            raise pickle.UnpicklingError("makes what is not on the list")
        self.append(made.target.__new__(made.target))

    def _load_build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if type(made) not in self._classes.values():
            raise pickle.UnpicklingError(f"sets attributes of a {type(made).__name__}")
        if hasattr(type(made), "__setstate__"):
            # It may print a state that it does not expect, and printing tuples of tuples of tuples can take for ever.
            if type(state) is not tuple or any(isinstance(value, tuple | list | dict) for value in state):
                raise pickle.UnpicklingError(f"has no such {type(made).__name__}")
            made.__setstate__(state)
            return
        names = {field.name for field in dataclasses.fields(made)}
        if type(state) is not dict or not state.keys() <= names:
            raise pickle.UnpicklingError(f"sets attributes that a {type(made).__name__} does not have")
        for name, value in state.items():
            object.__setattr__(made, name, value)

    def _load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def _load_setitems(self) -> None:
        items = self.pop_mark()
        for at in range(0, len(items), 2):
            self._set(items[at], items[at + 1])

    def _set(self, key: Any, value: Any) -> None:
        target = self.stack[-1]
        if type(target) is not dict or not self._is_key(key):
            raise pickle.UnpicklingError(f"sets a {type(key).__name__} as a key of a {type(target).__name__}")
        if type(key) is not str:
            # Numbers, and tuples of them, can be chosen so that a dict has to compare each with every other.
            self._hashes[hash(key)] += 1
            if self._hashes[hash(key)] > MAX_EQUAL_HASHES:
                raise pickle.UnpicklingError(f"has more than {MAX_EQUAL_HASHES} keys of one hash")
        target[key] = value

    def _count(self, kind: str, number: int = 1) -> None:
        self._left[kind] -= number
        if self._left[kind] < 0:
            raise pickle.UnpicklingError("makes more lists, dicts, tuples and objects than its length allows")

    def _load_mark(self) -> None:
        self._count("mark")
        self.load_mark()

    def _load_memoize(self) -> None:
        self._count("memory")
        self.load_memoize()

    def _load_long_binput(self) -> None:
        self._count("memory")
        self.load_long_binput()

    def _load_empty_list(self) -> None:
        self._count("list")
        self.append([])

    def _load_empty_dict(self) -> None:
        self._count("list")
        self.append({})

    def _load_tuple(self) -> None:
        self._count("object")
        items = self.pop_mark()
        self.append(tuple(items))

    def _load_tuple_1(self) -> None:
        self._count("object")
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _load_tuple_2(self) -> None:
        self._count("object")
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def _load_tuple_3(self) -> None:
        self._count("object")
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def _load_append(self) -> None:
        value = self.stack.pop()
        self._list().append(value)

    def _load_appends(self) -> None:
        items = self.pop_mark()
        self._list().extend(items)

    def _list(self) -> list[Any]:
        target: Any = self.stack[-1]
        if type(target) is not list:
            raise pickle.UnpicklingError(f"appends to a {type(target).__name__}")
        return target

    dispatch: ClassVar[dict[int, Any]] = {
        **{code[0]: _Reader.dispatch[code[0]] for code in _INSTRUCTIONS},
        pickle.APPEND[0]: _load_append,
        pickle.APPENDS[0]: _load_appends,
        pickle.BUILD[0]: _load_build,
        pickle.EMPTY_DICT[0]: _load_empty_dict,
        pickle.EMPTY_LIST[0]: _load_empty_list,
        pickle.LONG_BINPUT[0]: _load_long_binput,
        pickle.MARK[0]: _load_mark,
        pickle.MEMOIZE[0]: _load_memoize,
        pickle.NEWOBJ[0]: _load_newobj,
        pickle.REDUCE[0]: _load_reduce,
        pickle.SETITEM[0]: _load_setitem,
        pickle.SETITEMS[0]: _load_setitems,
        pickle.TUPLE[0]: _load_tuple,
        pickle.TUPLE1[0]: _load_tuple_1,
        pickle.TUPLE2[0]: _load_tuple_2,
        pickle.TUPLE3[0]: _load_tuple_3,
    }
