"""Zip archives where torch.save's are expected: the items of a plain DCP directory."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable

import torch

from attacks.corpus import attack
from attacks.hashes import pairs_of_one_hash
from attacks.pickles import Runs, archive, items_are, text
from ray_stateful.format import layout


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def repacked(data: bytes, change: Callable[[str, bytes], bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """The same archive with other members."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as original, zipfile.ZipFile(file, "w", compression) as made:
        for name in original.namelist():
            made.writestr(name, change(name, original.read(name)))
    return file.getvalue()


def zipped(*members: tuple[str, bytes]) -> bytes:
    """An archive of these members and what torch.save adds."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as made:
        # One name may be there twice.
        warnings.simplefilter("ignore")
        for name, data in (*members, ("archive/byteorder", b"little"), ("archive/version", b"3\n")):
            made.writestr(name, data)
    return file.getvalue()


@attack(foreign=True)
def archive_that_inflates(workshop):
    """A deflated member of half a megabyte that is half a gigabyte of zeros when it is read."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as made, made.open("archive/data.pkl", "w") as member:
        member.write(pickle.PROTO + b"\x02" + pickle.BINUNICODE + (1 << 29).to_bytes(4, "little"))
        for _ in range(512):
            member.write(bytes(1 << 20))
    items_are(workshop, file.getvalue())


@attack(foreign=True)
def archive_with_a_deflated_tensor(workshop):
    """The tensor's own bytes are deflated: 4 MB of zeros in a small item."""
    items_are(workshop, repacked(saved(torch.zeros(1 << 20)), lambda name, data: data, zipfile.ZIP_DEFLATED))


@attack(foreign=True)
def archive_whose_directory_lies(workshop):
    """The directory says that a member has four gigabytes; the file ends long before."""
    data = bytearray(saved("value"))
    entry = data.rfind(b"PK\x01\x02")
    struct.pack_into("<II", data, entry + 20, 0xFFFFFFF0, 0xFFFFFFF0)
    items_are(workshop, bytes(data))


@attack(foreign=True)
def archive_whose_members_overlap(workshop):
    """Ten thousand members are the same bytes, each counted as if it were its own."""
    data = saved("value" * 1000)
    entry_at, end_at = data.find(b"PK\x01\x02"), data.rfind(b"PK\x05\x06")
    with zipfile.ZipFile(io.BytesIO(data)) as opened:
        first = opened.infolist()[0]
    length = 46 + len(first.filename) + len(first.extra) + len(first.comment)
    entries = data[entry_at : entry_at + length] * 1000
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1000, 1000, len(entries), entry_at, 0)
    assert end_at > entry_at
    items_are(workshop, data[:entry_at] + entries + end)


@attack(foreign=True)
def archive_with_two_directories(workshop):
    """Two archives, one after the other: a reader that looks from the front finds another than one from the back."""
    inner = archive(pickle.dumps(Runs(print, "code"), protocol=2))
    items_are(workshop, saved("value") + inner + b"\0" * 30)


@attack(foreign=True)
def archive_without_a_directory(workshop):
    """The archive is cut off before its directory."""
    data = saved("value")
    items_are(workshop, data[: data.rfind(b"PK\x05\x06")])


@attack(foreign=True)
def archive_of_a_torchscript_module(workshop):
    """The archive is a TorchScript program, which torch.load would hand to torch.jit.load."""

    def add_constants(name: str, data: bytes) -> bytes:
        return data

    file = io.BytesIO(repacked(saved("value"), add_constants))
    with zipfile.ZipFile(file, "a") as made:
        made.writestr("archive/constants.pkl", b"\x80\x02).")
        made.writestr("archive/code/__torch__.py", b"def forward(self): pass\n")
    items_are(workshop, file.getvalue())


@attack(foreign=True, late=True)
def item_of_another_shape(workshop):
    """The item holds a tensor of another shape than the metadata says."""
    items_are(workshop, saved(torch.zeros(2, 1000)), "thing.layers.0")


@attack(foreign=True, late=True)
def item_without_elements(workshop):
    """The item is a tensor on the meta device: the right shape, and no bytes."""
    items_are(workshop, saved(torch.empty(2, device="meta")), "thing.layers.0")


@attack(foreign=True, late=True)
def item_that_is_sparse(workshop):
    """The item is a sparse tensor of the right shape, which fills any memory when it is made dense."""
    items_are(workshop, saved(torch.zeros(2).to_sparse()), "thing.layers.0")


@attack(foreign=True)
def item_file_is_a_hole(workshop):
    """An item of a terabyte that takes no room on the disk, for a tensor of some kilobytes."""
    path = workshop.directory / layout.DCP_METADATA
    metadata = pickle.loads(path.read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path, info.offset, info.length = "__0_9.distcp", 0, 1 << 40
    path.write_bytes(pickle.dumps(metadata))
    with open(workshop.directory / "__0_9.distcp", "wb") as file:
        file.truncate(1 << 40)


def key_without_an_end() -> bytes:
    """A pickle of a dict whose key is a tuple of two tuples of two tuples, 60 levels deep."""
    value = pickle.EMPTY_DICT + pickle.BINUNICODE + b"\1\0\0\0x" + pickle.BINPUT + b"\0"
    for level in range(60):
        # What was just made lies on the stack already. Were it fetched twice, torch would find it left over.
        value += pickle.BINGET + bytes([level]) + pickle.TUPLE2 + pickle.BINPUT + bytes([level + 1])
    return pickle.PROTO + b"\2" + value + pickle.NONE + pickle.SETITEM + pickle.STOP


@attack(foreign=True)
def item_with_a_key_whose_hash_never_ends(workshop):
    """A tuple of two tuples of two tuples, 60 levels deep, as a dict key of a value: torch's own reader hashes it."""
    items_are(workshop, archive(key_without_an_end()))


@attack(foreign=True)
def item_with_a_large_key_again_and_again(workshop):
    """The same 15 levels deep, set as a key half a million times: each time it is hashed anew."""
    value = pickle.BINUNICODE + b"\1\0\0\0x" + pickle.BINPUT + b"\0"
    for level in range(15):
        value += pickle.BINGET + bytes([level]) + pickle.TUPLE2 + pickle.BINPUT + bytes([level + 1])
    again = pickle.BINGET + b"\x0f" + pickle.NONE
    item_with(workshop, pickle.EMPTY_DICT + pickle.MARK + value + pickle.NONE + again * 500_000 + pickle.SETITEMS)


@attack(foreign=True)
def archive_with_its_pickle_in_capitals(workshop):
    """DATA.PKL: torch's reader ignores case and finds it; who looks for a name that ends with .pkl does not."""
    items_are(workshop, zipped(("archive/DATA.PKL", key_without_an_end())))


@attack(foreign=True)
def archive_with_two_pickles(workshop):
    """data.pkl twice: zipfile reads the last one, torch the first."""
    items_are(workshop, zipped(("archive/data.pkl", key_without_an_end()), ("archive/data.pkl", pickle.dumps("a", 2))))


@attack(foreign=True)
def archive_with_a_pickle_before_a_nul(workshop):
    """data.pkl and data.pkl, a NUL and more: zipfile ends the name at the NUL, and reads the last of the two."""
    first, harmless = ("archive/data.pkl", key_without_an_end()), ("archive/data.pkl.more", pickle.dumps("a", 2))
    items_are(workshop, zipped(first, harmless).replace(b"pkl.more", b"pkl\0more"))


@attack(foreign=True)
def archive_with_two_directories_and_one_end(workshop):
    """zipfile takes the directory before the end, torch the one that the end says: another, with another pickle."""
    evil, good = zipped(("archive/data.pkl", key_without_an_end())), zipped(("archive/data.pkl", pickle.dumps("a", 2)))
    at, of_good = evil.rfind(b"PK\5\6"), good.rfind(b"PK\5\6")
    size, begin = struct.unpack_from("<2I", evil, at + 12)
    good_size, good_begin = struct.unpack_from("<2I", good, of_good + 12)
    assert size == good_size
    # zipfile adds to each place what it finds the directory displaced by.
    directory = bytearray(good[good_begin:of_good])
    entry = 0
    while entry != -1:
        (place,) = struct.unpack_from("<I", directory, entry + 42)
        struct.pack_into("<I", directory, entry + 42, place + begin - good_begin)
        entry = directory.find(b"PK\1\2", entry + 1)
    end = good[of_good : of_good + 12] + struct.pack("<2IH", size, begin, 0)
    items_are(workshop, evil[:at] + good[:good_begin] + directory + end)


@attack(foreign=True)
def archive_that_is_encrypted(workshop):
    """A member is said to be encrypted: zipfile asks for a password."""
    data = bytearray(saved("value"))
    at = data.find(b"PK\1\2")
    while at != -1:
        data[at + 8] |= 1
        at = data.find(b"PK\1\2", at + 1)
    items_are(workshop, bytes(data))


@attack(foreign=True)
def archive_whose_members_begin_before_it(workshop):
    """Its directory is said to be at 2**64 - 1: zipfile finds it, and has all members begin as far before the file."""
    data = zipped(("archive/data.pkl", pickle.dumps("a", 2)))
    at = data.rfind(b"PK\5\6")
    number, size = struct.unpack_from("<HI", data, at + 10)
    end_64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, number, number, size, (1 << 64) - 1)
    locator = struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
    items_are(workshop, data[:at] + end_64 + locator + data[at:])


@attack(foreign=True)
def item_with_a_key_without_end(workshop):
    """A tuple in a tuple in a tuple, half a million deep: to hash it takes more stack than there is."""
    value = pickle.EMPTY_DICT + pickle.NONE + pickle.TUPLE1 * 500_000 + pickle.NONE + pickle.SETITEM
    items_are(workshop, archive(pickle.PROTO + b"\2" + value + pickle.STOP))


def item_with(workshop: object, *parts: bytes) -> None:
    """An item whose pickle has these instructions."""
    items_are(workshop, archive(pickle.PROTO + b"\2" + b"".join(parts) + pickle.STOP))


def name_of(module: str, name: str) -> bytes:
    """The instruction that looks a name up, in the only form that torch's reader knows."""
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def long(number: int) -> bytes:
    """The instruction that puts a number of any length on the stack."""
    digits = pickle.encode_long(number)
    return pickle.LONG1 + bytes([len(digits)]) + digits


@attack(foreign=True)
def item_that_doubles_itself(workshop):
    """Bytes as hexadecimal digits are twice as long, and those are again: a gigabyte out of a kilobyte."""
    value = name_of("_codecs", "encode") + text("ab") + text("latin1") + pickle.TUPLE2 + pickle.REDUCE
    for _ in range(29):
        value = name_of("_codecs", "encode") + value + text("hex_codec") + pickle.TUPLE2 + pickle.REDUCE
    item_with(workshop, value)


@attack(foreign=True)
def item_that_asks_for_zeros(workshop):
    """`bytearray(600_000_000)`, in 40 bytes: torch's reader calls it with whatever it is given."""
    size = pickle.BININT + (600_000_000).to_bytes(4, "little")
    item_with(workshop, name_of("builtins", "bytearray") + size + pickle.TUPLE1 + pickle.REDUCE)


@attack(foreign=True)
def item_of_what_lies_in_memory(workshop):
    """`torch.Tensor(1000)`: nobody wrote its elements; they are what the process had there, a key for example."""
    item_with(workshop, name_of("torch", "Tensor") + pickle.BININT2 + b"\xe8\3" + pickle.TUPLE1 + pickle.REDUCE)


@attack(foreign=True)
def item_of_a_storage_that_nobody_wrote(workshop):
    """A storage of a gigabyte, made by its class and not read from the archive."""
    name, size = name_of("torch.storage", "UntypedStorage"), pickle.BININT + (1 << 30).to_bytes(4, "little")
    item_with(workshop, name + size + pickle.TUPLE1 + pickle.REDUCE)


@attack(foreign=True)
def item_that_is_copied_without_end(workshop):
    """One list of 100,000 numbers, and a hundred thousand sets that are made of it."""
    numbers = b"".join(pickle.BININT + number.to_bytes(4, "little") for number in range(100_000))
    listed = pickle.EMPTY_LIST + pickle.MARK + numbers + pickle.APPENDS + pickle.TUPLE1 + pickle.BINPUT + b"\0"
    name = name_of("builtins", "set") + pickle.BINPUT + b"\1"
    sets = (pickle.BINGET + b"\1" + pickle.BINGET + b"\0" + pickle.REDUCE) * 100_000
    item_with(workshop, listed + name + pickle.EMPTY_LIST + pickle.MARK + sets + pickle.APPENDS)


@attack(foreign=True)
def item_of_empty_lists_by_the_million(workshop):
    """A byte each in the file, and 64 in memory: twenty million of them."""
    item_with(workshop, pickle.EMPTY_LIST + pickle.MARK + pickle.EMPTY_LIST * 20_000_000 + pickle.APPENDS)


@attack(foreign=True)
def item_of_numbers_of_one_hash(workshop):
    """A dict whose keys are multiples of 2**61 - 1, which all have the hash 0: each is compared with each."""
    keys = (pickle.encode_long(number * (2**61 - 1)) for number in range(1, 60_000))
    pairs = b"".join(pickle.LONG1 + bytes([len(key)]) + key + pickle.NONE for key in keys)
    item_with(workshop, pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS)


@attack(foreign=True)
def item_of_lists_in_lists(workshop):
    """A list of two lists of two lists, 60 levels deep: 300 bytes, until somebody copies, compares or prints it."""
    value = pickle.EMPTY_LIST + pickle.BINPUT + b"\0"
    for level in range(60):
        below = pickle.BINGET + bytes([level])
        value += pickle.EMPTY_LIST + pickle.BINPUT + bytes([level + 1]) + pickle.MARK + below + below + pickle.APPENDS
    item_with(workshop, value)


@attack(foreign=True)
def item_that_holds_itself(workshop):
    """A list that is its own entry, twice."""
    itself = pickle.BINGET + b"\0"
    item_with(workshop, pickle.EMPTY_LIST + pickle.BINPUT + b"\0" + pickle.MARK + itself + itself + pickle.APPENDS)


@attack(foreign=True)
def item_of_one_element_a_trillion_times(workshop):
    """A value that is a tensor of one element, whose strides are 0 and whose size is a terabyte once it is copied."""
    items_are(workshop, saved((torch.ones(1).expand(1 << 40),)))


@attack(foreign=True)
def item_of_tuples_of_one_hash(workshop):
    """Fifty thousand pairs of numbers whose tuples have one hash, as the keys of a dict."""
    pairs = b"".join(
        pickle.BININT + first.to_bytes(4, "little") + long(second) + pickle.TUPLE2 + pickle.NONE
        for first, second in pairs_of_one_hash(50_000)
    )
    item_with(workshop, pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS)


@attack(foreign=True)
def item_of_complex_numbers_of_one_hash(workshop):
    """The same of complex numbers, each made by a call: of the two parts one makes up for the other."""
    made = name_of("builtins", "complex") + pickle.BINPUT + b"\0"
    numbers = b"".join(
        (made if number == 0 else pickle.BINGET + b"\0")
        + pickle.BINFLOAT
        + struct.pack(">d", -1000003.0 * number)
        + pickle.BINFLOAT
        + struct.pack(">d", float(number))
        + pickle.TUPLE2
        + pickle.REDUCE
        + pickle.NONE
        for number in range(50_000)
    )
    item_with(workshop, pickle.EMPTY_DICT + pickle.MARK + numbers + pickle.SETITEMS)


@attack(foreign=True)
def item_of_a_sparse_tensor_out_of_bounds(workshop):
    """A sparse tensor of two elements, one of which is at index 10**12: whoever makes it dense writes there."""
    indices, value = torch.tensor([[10**12]]), torch.tensor([1.0])
    items_are(workshop, saved({"a": torch.sparse_coo_tensor(indices, value, (2,), check_invariants=False)}))
