"""Indexes whose rows do not fit the files, or each other; the manifest vouches for them."""

from __future__ import annotations

import dataclasses
import os
import random

import pyarrow as pa

from attacks.corpus import attack
from attacks.hashes import MODULUS, offsets_of_one_hash, pairs_of_one_hash
from ray_stateful.format import layout
from ray_stateful.format.chunks import Box
from ray_stateful.format.index import SCHEMA
from ray_stateful.format.rows import IntKey


@attack
def row_with_a_file_above(workshop):
    """A row's file leads out of the directory."""
    workshop.row("thing.weights", file="../secret")


@attack
def row_with_a_file_of_the_machine(workshop):
    """A row's file is an absolute path."""
    workshop.row("thing.weights", file="/etc/passwd")


@attack
def row_with_backslashes(workshop):
    """A row's file leads upwards where backslashes separate."""
    workshop.row("thing.weights", file="..\\__0_0.distcp")


@attack
def row_with_a_nul(workshop):
    """A row's file has a NUL byte in it."""
    workshop.row("thing.weights", file="__0_0.distcp\0.txt")


@attack
def row_of_a_file_that_is_not_named(workshop):
    """A row's file is there, and the manifest does not name it: one left by a world of another size."""
    (workshop.directory / "__7_0.distcp").write_bytes(bytes(100_000))
    workshop.row("thing.weights", file="__7_0.distcp")


@attack
def row_of_the_manifest(workshop):
    """A row's bytes are those of the index itself."""
    workshop.row("thing.weights", file=layout.INDEX)


@attack
def row_at_a_negative_offset(workshop):
    """An item before the file."""
    workshop.row("thing.weights", item_offset=-8, data_offset=-8)


@attack
def row_of_a_negative_length(workshop):
    """An item that ends before it begins."""
    workshop.row("thing.weights", item_length=-8)


@attack
def row_with_an_overflowing_end(workshop):
    """Offset and length are each a 64-bit number, and their sum is not."""
    workshop.row("thing.weights", item_offset=2**63 - 1, data_offset=2**63 - 1, item_length=2**63 - 1)


@attack
def row_of_an_exabyte(workshop):
    """A shape that overflows 64 bits when it is multiplied."""
    shape = (2**32, 2**32)
    workshop.row("thing.weights", shape=shape, box=Box((0, 0), shape))


@attack
def row_of_zeros_and_an_exabyte(workshop):
    """A shape with a zero in it, for whoever multiplies only until there is nothing left."""
    shape = (0, 2**62, 2**62)
    workshop.row("thing.weights", shape=shape, box=Box((0, 0, 0), shape), checksums=b"")


@attack
def row_of_a_negative_shape(workshop):
    """Two negative sizes, whose product is positive."""
    workshop.row("thing.weights", shape=(-40, -30), box=Box((0, 0), (-40, -30)))


@attack
def row_of_a_thousand_dims(workshop):
    """More dims than any tensor has."""
    workshop.row("thing.weights", shape=(1,) * 1000, box=Box((0,) * 1000, (1,) * 1000))


@attack
def row_whose_box_is_outside(workshop):
    """A chunk beyond the end of its tensor."""
    workshop.row("thing.weights", box=Box((40, 0), (40, 30)))


@attack
def row_whose_data_is_outside(workshop):
    """The elements begin before their item."""
    row = next(row for row in workshop.rows() if row.key == "thing.weights")
    workshop.row("thing.weights", data_offset=row.item_offset - 1 if row.item_offset else 10**9)


@attack
def row_of_an_unknown_dtype(workshop):
    """A dtype that is a name of torch, and no dtype."""
    workshop.row("thing.weights", dtype="load")


@attack
def row_with_blocks_of_nothing(workshop):
    """Blocks of 0 bytes: a division, or a loop without end."""
    workshop.row("thing.weights", block_bytes=0)


@attack
def row_with_blocks_of_one_byte(workshop):
    """A checksum for each byte: a thousand times the work."""
    row = next(row for row in workshop.rows() if row.key == "thing.weights")
    workshop.row("thing.weights", block_bytes=1, checksums=bytes(8 * row.num_bytes))


@attack
def row_with_negative_blocks(workshop):
    """A negative block size."""
    workshop.row("thing.weights", block_bytes=-1024)


@attack
def row_without_checksums(workshop):
    """No checksum, and so none that differs."""
    workshop.row("thing.weights", checksums=b"")


@attack
def row_with_a_checksum_too_few(workshop):
    """The last block would not be compared with anything."""
    row = next(row for row in workshop.rows() if row.key == "thing.weights")
    workshop.row("thing.weights", checksums=row.checksums[:-8])


@attack
def rows_that_leave_a_gap(workshop):
    """Half of a tensor is nowhere: it would stay as it was."""
    workshop.row("thing.weights", shape=(80, 30))


@attack
def rows_that_overlap(workshop):
    """Two chunks of one tensor hold the same elements."""
    row = next(row for row in workshop.rows() if row.key == "thing.other")
    place = {field: getattr(row, field) for field in ("file", "item_offset", "item_length", "data_offset", "checksums")}
    rows = [row for row in workshop.rows() if row.key != "thing.other"]
    weights = next(row for row in rows if row.key == "thing.weights")
    rows = [dataclasses.replace(row, shape=(60, 30)) if row.key == "thing.weights" else row for row in rows]
    workshop.write_rows([*rows, dataclasses.replace(weights, shape=(60, 30), box=Box((20, 0), (40, 30)), **place)])


@attack
def rows_that_overlap_by_the_thousand(workshop):
    """Twenty thousand chunks of which each overlaps each: 200 million pairs to be compared, and to be told of."""
    rows = [row for row in workshop.rows() if row.key != "thing.weights"]
    row = next(row for row in workshop.rows() if row.key == "thing.weights")
    n = 20_000
    many = [
        dataclasses.replace(row, shape=(n,), box=Box((i,), (min(400, n - i),)), checksums=bytes(16), data_offset=at)
        for i in range(n)
        for at in [row.data_offset]
    ]
    many = [dataclasses.replace(one, checksums=bytes(8 * -(-one.num_bytes // one.block_bytes))) for one in many]
    workshop.write_rows([*rows, *many])


@attack
def row_that_stands_there_twice(workshop):
    """One chunk, two rows: one of them is not what is read."""
    workshop.add("thing.weights")


@attack
def value_that_stands_there_twice(workshop):
    """One value, two of them."""
    workshop.add("thing.name", value='"another name"')


@attack
def tensors_in_one_place(workshop):
    """A thousand tensors are the same bytes: a file of some kilobytes is as many gigabytes as one likes."""
    rows = workshop.rows()
    row = next(row for row in rows if row.key == "thing.weights")
    many = [dataclasses.replace(row, key=f"thing.more{n}", path=("thing", f"more{n}")) for n in range(1000)]
    workshop.write_rows([*rows, *many])


@attack
def tensor_with_a_value(workshop):
    """An entry that is a tensor and a value, for two readers to disagree on."""
    workshop.row("thing.weights", value="1")


@attack
def value_without_a_value(workshop):
    """An entry that is neither."""
    workshop.row("thing.name", value=None)


@attack
def value_repeated_by_reference(workshop):
    """One value of a megabyte, and twenty thousand rows that refer to it: 20 GB of them, in a file of 3 MB."""
    rows = workshop.rows()
    row = next(row for row in rows if row.key == "thing.name")
    text = '"' + "x" * 1_000_000 + '"'
    many = [dataclasses.replace(row, key=f"thing.n{n}", path=("thing", f"n{n}"), value=text) for n in range(20_000)]
    workshop.write_rows([*rows, *many])


@attack
def index_that_inflates(workshop):
    """Compressed buffers: 100 MB of zeros are a few kilobytes, and a gigabyte not many more."""
    rows = workshop.rows()
    row = next(row for row in rows if row.key == "thing.name")
    workshop.write_rows([*rows, dataclasses.replace(row, key="thing.z", path=("thing", "z"), value="0" * 100_000_000)])
    table = workshop.table()
    workshop.write_table(table, options=pa.ipc.IpcWriteOptions(compression="zstd"))


@attack
def index_of_endless_rows(workshop):
    """Ten million rows whose columns are all the same few bytes: 1 kB a row once they are Python's."""
    n = 10_000_000
    zeros = pa.py_buffer(bytes(4 * (n + 1) * 2))
    text = pa.Array.from_buffers(pa.string(), n, [None, zeros, pa.py_buffer(b"")])
    codes = pa.Array.from_buffers(pa.int32(), n, [None, zeros])
    longs = pa.Array.from_buffers(pa.int64(), n, [None, zeros])
    lists = pa.Array.from_buffers(pa.list_(pa.int64()), n, [None, zeros], children=[pa.array([], pa.int64())])
    blobs = pa.Array.from_buffers(pa.binary(), n, [None, zeros, pa.py_buffer(b"")])
    names = pa.DictionaryArray.from_arrays(codes, pa.array(["x"]))
    by_type = {pa.string(): text, pa.int64(): longs, pa.int32(): codes, pa.binary(): blobs}
    columns = []
    for field in SCHEMA:
        known = by_type.get(field.type)
        if known is None:
            known = names if pa.types.is_dictionary(field.type) else lists.cast(field.type)
        columns.append(known)
    # A fifth of it, as the file itself would be large: what is tried is the factor.
    workshop.write_table(pa.Table.from_arrays([column.slice(0, n // 20) for column in columns], schema=SCHEMA))


@attack
def index_with_other_columns(workshop):
    """A column is missing, and another is there instead."""
    workshop.write_table(workshop.table().rename_columns([*SCHEMA.names[:-1], "pickled"]))


@attack
def index_with_other_types(workshop):
    """Offsets are floats, NaN among them."""
    table = workshop.table()
    column = pa.array([float("nan")] * table.num_rows)
    workshop.write_table(table.set_column(table.schema.get_field_index("item_offset"), "item_offset", column))


@attack
def index_with_nulls(workshop):
    """Nothing where a number is expected."""
    table = workshop.table()
    at = table.schema.get_field_index("item_offset")
    workshop.write_table(table.set_column(at, SCHEMA.field(at), pa.nulls(table.num_rows, pa.int64())))


@attack
def index_cut_short(workshop):
    """The index ends within a message, and the manifest says that it should."""
    data = (workshop.directory / layout.INDEX).read_bytes()
    workshop.write(layout.INDEX, data[: len(data) // 2])


@attack
def index_whose_lengths_lie(workshop):
    """The first message says that it is two gigabytes long."""
    data = bytearray((workshop.directory / layout.INDEX).read_bytes())
    data[4:8] = (2**31 - 1).to_bytes(4, "little")
    workshop.write(layout.INDEX, bytes(data))


@attack
def shapes_of_one_hash(workshop):
    """Thirty thousand rows whose shapes have one hash: a dict that keeps one of each compares each with each."""
    row = next(row for row in workshop.rows() if row.key == "thing.weights")
    # A number and the same plus 2**61 - 1 have one hash, and so have tuples of them.
    shapes = [tuple((2**61 - 1) * (number >> bit & 1) for bit in range(15)) for number in range(1 << 15)]
    workshop.write_rows([dataclasses.replace(row, shape=shape, box=Box((0,) * 15, shape)) for shape in shapes])


@attack
def index_that_is_empty(workshop):
    """No bytes, with the checksum of no bytes."""
    workshop.write(layout.INDEX, b"")


@attack
def index_that_is_a_hole(workshop):
    """An index of a terabyte that takes no room on the disk."""
    with open(workshop.directory / layout.INDEX, "wb") as file:
        file.truncate(1 << 40)
    workshop.manifest(lambda body: body["files"][layout.INDEX].update(size=1 << 40))


def batches(workshop, number, texts, options=None):
    """An index of so many batches without rows; before each comes the dictionary of values that `texts` gives."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA, options=options) as writer:
        for batch in range(number):
            columns = [pa.array([], field.type) for field in SCHEMA]
            columns[-1] = pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), texts(batch))
            writer.write_batch(pa.record_batch(columns, schema=SCHEMA))
    workshop.write(layout.INDEX, sink.getvalue().to_pybytes())


@attack
def index_of_endless_batches(workshop):
    """Two thousand batches of no rows that refer to one dictionary of a million texts, which is read for each."""
    texts = pa.array([""] * 1_000_000)
    batches(workshop, 2000, lambda _: texts)


@attack
def index_whose_dictionary_grows(workshop):
    """A dictionary of half a million texts, and one more before each of 500 batches: each keeps all of it, 2 MB."""
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    texts = pa.array(["", *"x" * 500_000])
    batches(workshop, 500, lambda batch: texts[: 500_000 - 500 + batch], options)


def many(workshop, *changes):
    """Add rows like that of a tensor or value, each with its changes."""
    rows = workshop.rows()
    first = {row.key: row for row in rows}
    workshop.write_rows(
        [
            *rows,
            *(
                dataclasses.replace(first[like], key=".".join(map(str, path)), path=path, **one)
                for like, path, one in changes
            ),
        ]
    )


@attack
def places_without_elements_of_one_hash(workshop):
    """Twenty-five thousand chunks without elements, whose offsets have one hash."""
    shape = (*(1,) * 22, 1 << 57)
    empty = {"dtype": "uint8", "shape": shape, "checksums": b"", "block_bytes": 1024}
    many(
        workshop,
        *(
            ("thing.weights", ("thing", "empty"), {**empty, "box": Box(offsets, (0,) * 23)})
            for offsets in offsets_of_one_hash(25_000, 23)
        ),
    )


@attack
def int_keys_of_one_hash(workshop):
    """Forty thousand keys of a dict that are multiples of 2**61 - 1, which all have the hash 0."""
    keys = (IntKey(number * MODULUS) for number in range(40_000))
    many(workshop, *(("thing.name", ("thing", "numbers", key), {"value": "1"}) for key in keys))


@attack
def paths_of_one_hash(workshop):
    """Paths of two numbers each, without the name of a part, in whose tuples one makes up for the other."""
    workshop.manifest(lambda body: body.update(parts=[]))
    pairs = pairs_of_one_hash(40_000)
    many(workshop, *(("thing.name", tuple(map(IntKey, pair)), {"value": "1"}) for pair in pairs))


@attack
def chunks_of_four_million_corners(workshop):
    """Sixteen thousand boxes, cut along eight dims, of 256 corners each, which are added up to see whether they fit."""
    place, file, num_bytes, number = random.Random(0), "__9_0.distcp", 1 << 32, 1 << 14
    (workshop.directory / file).touch()
    os.truncate(workshop.directory / file, num_bytes)
    workshop.manifest(lambda body: body["files"].update({file: {"size": num_bytes, "xxh3": "0" * 16}}))
    each = num_bytes // number
    boxes = {}
    while len(boxes) < number:
        small = place.sample(range(8), 6)
        sizes = tuple(4 if dim in small else 8 for dim in range(8))
        boxes.setdefault(tuple(place.randrange(17 - size) for size in sizes), sizes)
    many(
        workshop,
        *(
            (
                "thing.weights",
                ("thing", "cut"),
                {
                    "dtype": "uint8",
                    "shape": (16,) * 8,
                    "box": Box(offsets, sizes),
                    "file": file,
                    "item_offset": at * each,
                    "data_offset": at * each,
                    "item_length": each,
                    "block_bytes": 1 << 16,
                    "checksums": bytes(8 * each >> 16),
                },
            )
            for at, (offsets, sizes) in enumerate(boxes.items())
        ),
    )


@attack
def key_that_takes_minutes_to_print(workshop):
    """A key of letters with dots between them, "a.a.a.a", each of which may begin a URI with a password."""
    name = "a." * 300_000
    workshop.row("thing.name", key=f"thing.{name}", path=("thing", name), value=None)
