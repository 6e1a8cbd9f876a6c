"""Items whose pickle makes something other than it seems to, by names, states and numbers that torch's reader takes."""

from __future__ import annotations

import pickle

from attacks.archives import item_with, long, name_of, zipped
from attacks.corpus import attack
from attacks.pickles import items_are, text


def stored(size: int, key: str = "0") -> bytes:
    """The instructions that fetch a storage of so many floats, which says so itself."""
    pid = text("storage") + name_of("torch", "FloatStorage") + text(key) + text("cpu") + long(size)
    return pickle.MARK + pid + pickle.TUPLE + pickle.BINPERSID


def shaped(size: int) -> bytes:
    """The instructions of an offset, sizes and strides of a tensor of one dim."""
    return pickle.BININT1 + b"\0" + long(size) + pickle.TUPLE1 + pickle.BININT1 + b"\1" + pickle.TUPLE1


def hooks() -> bytes:
    return name_of("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE


def tensor_of(storage: bytes, size: int) -> bytes:
    """The instructions that make a tensor of one dim, as torch.save writes them."""
    arguments = pickle.MARK + storage + shaped(size) + pickle.NEWFALSE + hooks() + pickle.TUPLE
    return name_of("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def item_with_data(workshop: object, *parts: bytes) -> None:
    """An item whose pickle has these instructions, with a storage of two floats."""
    pickled = pickle.PROTO + b"\2" + b"".join(parts) + pickle.STOP
    items_are(workshop, zipped(("archive/data.pkl", pickled), ("archive/data/0", bytes(8))))


@attack(foreign=True)
def item_of_a_storage_larger_than_its_file(workshop):
    """A storage of eight bytes that says it has a megabyte: what comes after it in memory would be its elements."""
    item_with_data(workshop, tensor_of(stored(1 << 18), 1 << 18))


@attack(foreign=True)
def item_of_memory_by_build(workshop):
    """Two tensors without elements, by BUILD: the second is given the first's storage, which grows to a thousand."""
    empty = tensor_of(stored(2), 2) + pickle.EMPTY_TUPLE + pickle.BUILD + pickle.BINPUT + b"\0"
    state = pickle.MARK + pickle.BINGET + b"\0" + shaped(1000) + pickle.TUPLE
    item_with_data(workshop, empty + tensor_of(stored(2), 2) + state + pickle.BUILD + pickle.TUPLE2)


@attack(foreign=True)
def item_of_memory_by_a_parameter(workshop):
    """A parameter made of nothing, whose storage grows, stands for a storage that was read."""
    nothing = name_of("torch._utils", "_rebuild_parameter") + pickle.NONE + pickle.NEWFALSE + hooks()
    nothing += pickle.TUPLE3 + pickle.REDUCE
    state = pickle.EMPTY_DICT + text("_untyped_storage") + nothing + pickle.SETITEM
    posing = name_of("torch._utils", "_rebuild_parameter_with_state")
    posing += pickle.MARK + pickle.NONE + pickle.NEWFALSE + hooks() + state + pickle.TUPLE + pickle.REDUCE
    item_with(workshop, tensor_of(posing, 1000))


@attack(foreign=True)
def item_of_a_tensor_that_hides_its_size(workshop):
    """A tensor with an attribute of its own called `numel`, which whoever asks for its size calls."""
    state = pickle.EMPTY_DICT + text("numel") + name_of("torch", "Size") + pickle.SETITEM
    arguments = pickle.MARK + tensor_of(stored(2), 2) + pickle.NEWFALSE + hooks() + state + pickle.TUPLE
    item_with_data(workshop, name_of("torch._utils", "_rebuild_parameter_with_state") + arguments + pickle.REDUCE)


@attack(foreign=True, late=True)
def tensor_that_is_narrowed_by_somebody_else(workshop):
    """A tensor of the right shape with an attribute of its own called `narrow`, which a reader of a part calls."""
    state = pickle.EMPTY_DICT + text("narrow") + name_of("torch", "Tensor") + pickle.SETITEM
    arguments = pickle.MARK + stored(2) + shaped(2) + pickle.NEWFALSE + hooks() + pickle.TUPLE
    function, kind = name_of("torch._utils", "_rebuild_tensor_v2"), name_of("torch", "Tensor")
    rebuilt = pickle.MARK + function + kind + arguments + state + pickle.TUPLE
    pickled = pickle.PROTO + b"\2" + name_of("torch._tensor", "_rebuild_from_type_v2") + rebuilt + pickle.REDUCE
    data = zipped(("archive/data.pkl", pickled + pickle.STOP), ("archive/data/0", bytes(8)))
    items_are(workshop, data, "thing.layers.0")


@attack(foreign=True)
def item_of_a_dict_that_hides_its_items(workshop):
    """A dict with an attribute of its own called `items`, which whoever walks its entries calls."""
    state = pickle.EMPTY_DICT + text("items") + name_of("builtins", "complex") + pickle.SETITEM
    item_with(workshop, hooks() + state + pickle.BUILD)


@attack(foreign=True)
def item_of_copies_by_an_old_name(workshop):
    """Counters of one list of 100,000 numbers, hundreds of them, by the name of a module of Python 2."""
    numbers = b"".join(pickle.BININT + number.to_bytes(4, "little") for number in range(100_000))
    listed = pickle.EMPTY_LIST + pickle.MARK + numbers + pickle.APPENDS + pickle.BINPUT + b"\0"
    name = name_of("UserDict", "Counter") + pickle.BINPUT + b"\1"
    again = (pickle.BINGET + b"\1" + pickle.BINGET + b"\0" + pickle.TUPLE1 + pickle.REDUCE) * 300
    item_with(workshop, pickle.EMPTY_LIST + pickle.MARK + listed + name + again + pickle.APPENDS)


@attack(foreign=True)
def item_of_nothing_by_the_million(workshop):
    """Five million times None, a byte each, before a call that is refused: notes about each would fill a gigabyte."""
    nothing = pickle.EMPTY_LIST + pickle.MARK + pickle.NONE * 5_000_000 + pickle.APPENDS
    item_with(workshop, name_of("os", "getcwd") + nothing + pickle.REDUCE)


@attack(foreign=True)
def item_remembered_without_end(workshop):
    """One object, put into the pickle's memory ten million times (MEMOIZE), each time under a new number."""
    item_with(workshop, pickle.NONE + pickle.MEMOIZE * 10_000_000)
