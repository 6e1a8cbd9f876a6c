"""What is stored comes back, whatever it is; and what was not stored by us is refused, never a crash."""

import collections
import dataclasses
import enum
import io
import itertools
import json
import math
import os
import pickle
import random
import zipfile
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from numpy._core._rational_tests import rational

from ray_stateful.errors import DamagedCheckpoint, HostileCheckpoint, UnknownFormat, UnsupportedState
from ray_stateful.format import checksums, index, layout, values
from ray_stateful.format.chunks import Box, coverage_problems, intersection, span_of, split, strides_of
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.manifest import Manifest, StoredFile
from ray_stateful.format.rows import IntKey, StoredChunk, tree_row
from ray_stateful.format.torch_item import envelope

# torch says so of complex32, the first time that it meets it.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

# Derandomised, so that a run in CI says of the code what the run before said of it.
steady = settings(
    derandomize=True, deadline=None, max_examples=100, database=None, suppress_health_check=list(HealthCheck)
)

shapes = st.lists(st.integers(1, 7), max_size=3).map(tuple)


@st.composite
def grids(draw):
    """A shape, and boxes that tile it: each dim is cut at places of its own."""
    shape = draw(shapes)
    cuts = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))}) for size in shape]
    boxes = [Box((), ())]
    for edges in cuts:
        spans = list(itertools.pairwise(edges))
        boxes = [Box((*box.offsets, a), (*box.sizes, b - a)) for box in boxes for a, b in spans]
    return shape, draw(st.permutations(boxes))


@st.composite
def sub_boxes(draw):
    shape = draw(shapes)
    offsets = tuple(draw(st.integers(0, size - 1)) for size in shape)
    return shape, Box(offsets, tuple(draw(st.integers(1, s - o)) for s, o in zip(shape, offsets, strict=True)))


def elements(box, shape):
    """The row-major numbers of a box's elements, the slow way."""
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))]


@steady
@given(grids())
def test_a_tiling_has_no_problems(grid):
    assert coverage_problems(*grid) == []


@steady
@given(grids(), st.data())
def test_a_tiling_with_a_box_changed_has_problems(grid, data):
    shape, boxes = grid
    at = data.draw(st.integers(0, len(boxes) - 1))
    other = data.draw(st.sampled_from([None, *boxes[:at], *boxes[at + 1 :]]))
    changed = [*boxes[:at], *([] if other is None else [other]), *boxes[at + 1 :]]
    assert coverage_problems(shape, changed) != []


@steady
@given(sub_boxes(), st.data())
def test_whether_boxes_tile_a_shape_is_what_counting_each_element_says(first, data):
    shape, box = first
    boxes = [box]
    for _ in range(data.draw(st.integers(0, 4))):
        offsets = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
        sizes = tuple(data.draw(st.integers(1, s - o)) for s, o in zip(shape, offsets, strict=True))
        boxes.append(Box(offsets, sizes))
    counts = np.zeros(shape, dtype=int)
    for one in boxes:
        counts[tuple(slice(o, o + n) for o, n in zip(one.offsets, one.sizes, strict=True))] += 1
    assert (coverage_problems(shape, boxes) == []) == bool((counts == 1).all())


@pytest.mark.parametrize(
    ("shape", "boxes", "named"),
    [
        ((4,), [Box((0,), (5,))], "outside"),
        ((4,), [Box((-1,), (5,))], "outside"),
        ((4,), [Box((0, 0), (4, 4))], "outside"),
        ((4,), [Box((0,), (3,))], "3 of 4"),
        ((4,), [Box((0,), (3,)), Box((1,), (3,))], "overlap"),
        ((), [], "0 of 1"),
        ((), [Box((), ())] * 2, "overlap"),
        ((2,) * 9, [Box((0,) * 9, (1,) * 9)], "9 dims"),
    ],
)
def test_what_is_wrong_with_a_tiling_is_said(shape, boxes, named):
    assert named in " ".join(coverage_problems(shape, boxes))


@steady
@given(sub_boxes())
def test_a_span_holds_the_box_and_begins_and_ends_with_it(case):
    shape, box = case
    numbers = elements(box, shape)
    assert span_of(box, shape) == (numbers.min(), numbers.max() + 1)
    assert intersection(box, Box((0,) * len(shape), shape)) == box


@steady
@given(sub_boxes(), st.integers(1, 60), st.integers(0, 60))
def test_a_box_is_split_into_boxes_that_make_it_up_and_are_as_narrow_as_asked(case, max_span, max_gap):
    shape, box = case
    parts = list(split(box, shape, max_span, max_gap))
    found = np.concatenate([elements(part, shape).ravel() for part in parts])
    assert sorted(found) == sorted(elements(box, shape).ravel())
    for part in parts:
        first, stop = span_of(part, shape)
        assert part.num_elements == 1 or stop - first <= max_span
        gaps = np.diff(np.sort(elements(part, shape).ravel())) - 1
        assert gaps.max(initial=0) <= max_gap


@steady
@given(st.binary(max_size=9000), st.integers(0, 3), st.data())
def test_a_changed_byte_is_found_in_its_block(content, power, data):
    block_bytes = checksums.MIN_BLOCK_BYTES << power
    expected = checksums.block_checksums(content, block_bytes)
    assert len(expected) == 8 * checksums.num_blocks(len(content), block_bytes)
    assert checksums.first_bad_block(content, block_bytes, expected) is None
    if content:
        at = data.draw(st.integers(0, len(content) - 1))
        changed = bytearray(content)
        changed[at] ^= 1 << data.draw(st.integers(0, 7))
        assert checksums.first_bad_block(changed, block_bytes, expected) == at // block_bytes


@steady
@given(st.integers(0, 1 << 40))
def test_a_block_size_is_a_power_of_two_within_bounds(num_bytes):
    block_bytes = checksums.block_bytes_for(num_bytes)
    assert block_bytes & (block_bytes - 1) == 0
    assert checksums.MIN_BLOCK_BYTES <= block_bytes <= checksums.MAX_BLOCK_BYTES


@steady
@given(st.integers(1 << 18, 1 << 28))
def test_the_checksums_of_a_tensor_are_about_as_large_as_one_of_its_blocks(num_bytes):
    # Of both together there is least then: a rank has all checksums, and reads a block too much at the ends of its own.
    block_bytes = checksums.block_bytes_for(num_bytes)
    assert block_bytes <= checksums.CHECKSUM_BYTES * num_bytes / block_bytes < 4 * block_bytes


@steady
@given(st.lists(st.binary(max_size=50)))
def test_a_running_checksum_is_that_of_the_whole(pieces):
    running = checksums.RunningChecksum()
    for piece in pieces:
        running.update(piece)
    assert running.hexdigest() == checksums.checksum(b"".join(pieces))


dtypes = sorted(name for name in ITEM_BYTES if hasattr(torch, name))


@st.composite
def tensors(draw):
    name, shape = draw(st.sampled_from(dtypes)), draw(st.lists(st.integers(0, 4), max_size=3).map(tuple))
    num_bytes = math.prod(shape) * ITEM_BYTES[name]
    raw = bytearray(draw(st.binary(min_size=num_bytes, max_size=num_bytes)))
    if name == "bool":
        raw = bytearray(byte & 1 for byte in raw)
    flat = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return flat.view(getattr(torch, name)).reshape(shape)


hashables = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=6,
)
arrays = numpy_strategies.arrays(
    dtype=numpy_strategies.scalar_dtypes()
    | numpy_strategies.unicode_string_dtypes()
    | numpy_strategies.byte_string_dtypes(),
    shape=numpy_strategies.array_shapes(min_dims=0, min_side=0, max_dims=3, max_side=3),
)
leaves = (
    hashables
    | st.floats()
    | tensors()
    | arrays
    | arrays.filter(lambda array: array.size).map(lambda array: array.reshape(-1)[0])
    | st.sampled_from([torch.float32, torch.bfloat16, torch.device("cuda:1"), torch.device("cpu"), torch.Size([2, 3])])
)
anything = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(hashables, inner, max_size=3)
        | st.dictionaries(st.text(), inner, max_size=3)
        | st.dictionaries(st.text(), inner, max_size=3).map(collections.OrderedDict)
        | st.dictionaries(hashables, st.integers(), max_size=3).map(collections.Counter)
        | st.sets(hashables, max_size=3)
    ),
    max_leaves=12,
)


def same(found, expected):
    if type(found) is not type(expected):
        return False
    if isinstance(expected, torch.Tensor):
        raw = [t.contiguous().reshape(-1).view(torch.uint8) for t in (found, expected)]
        return found.dtype == expected.dtype and found.shape == expected.shape and torch.equal(*raw)
    if isinstance(expected, np.ndarray | np.generic):
        return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()
    if isinstance(expected, dict):
        return len(found) == len(expected) and all(
            same(a, b) for a, b in zip(found.items(), expected.items(), strict=True)
        )
    if isinstance(expected, set | frozenset):
        # A NaN is in a set by its identity, and True is 1: the encoding, which is sorted, tells and does not care.
        return values.encode(found, "found") == values.encode(expected, "expected")
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(same(a, b) for a, b in zip(found, expected, strict=True))
    return found == expected or (found != found and expected != expected)


@steady
@given(anything)
def test_a_value_comes_back_as_it_was(value):
    text = values.encode(value, "key")
    assert same(values.decode(text, "here"), value)
    assert values.encode(values.decode(text, "here"), "key") == text


@steady
@given(st.lists(hashables, max_size=6, unique_by=repr))
def test_equal_sets_have_one_encoding(items):
    other = items[::-1]  # sets of the same items may list them in the order in which they came
    assert values.encode(set(items), "key") == values.encode(set(other), "key")


tags = ["$tuple", "$set", "$bytes", "$float", "$complex", "$dict", "$numpy", "$ndarray", "$tensor", "$dtype", "$size"]
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 1 << 70)
    | st.text(max_size=4)
    | st.sampled_from(["<f4", "float32", "AAAA"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*tags, "$device", "$counter", "$frozenset", "$other", "a"]), inner, max_size=2
        )
    ),
    max_leaves=8,
)


@settings(steady, max_examples=400)
@given(json_values)
def test_any_json_is_a_value_or_refused(tree):
    try:
        values.decode(json.dumps(tree), "here")
    except DamagedCheckpoint as error:
        assert "here" in str(error)  # noqa: PT017 - most examples raise, and those that do not are as good


@steady
@given(st.text(alphabet='[]{}",:$ 01anul', max_size=30))
def test_any_text_is_a_value_or_refused(text):
    try:
        values.decode(text, "here")
    except DamagedCheckpoint as error:
        assert "here" in str(error)  # noqa: PT017 - as above


class Colour(enum.IntEnum):
    RED = 1


class Pair(NamedTuple):
    first: int
    second: int


REFUSED = {
    "digits": 1 << 20000,
    "object": object(),
    "record": np.zeros(1, dtype=[("a", "i4")])[0],
    "deep": [[]] * 2 + [print],
    "enum": Colour.RED,
    "named tuple": Pair(1, 2),
    "subclass of dict": defaultdict(list),
    "bytearray": bytearray(b"x"),
    # numpy drops the zeros at their ends.
    "text with a zero": np.str_("a\0"),
    "bytes with a zero": np.bytes_(b"a\0"),
    # JSON has one spelling for it and for the whole character.
    "character in two halves": "\ud83d\ude00",
    "key in two halves": {"\ud83d\ude00": 1},
    "dtype of another package": np.array([rational(1, 2)]),
    "meta tensor": torch.empty(3, device="meta"),
    "sparse tensor": torch.eye(2).to_sparse(),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    # Element types that no reader knows.
    "quantized dtype": torch.quint8,
}
if hasattr(torch, "float4_e2m1fn_x2"):  # since torch 2.8
    REFUSED["dtype of halves of bytes"] = torch.float4_e2m1fn_x2
    REFUSED["tensor of halves of bytes"] = (torch.empty(2, dtype=torch.float4_e2m1fn_x2),)


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_what_has_no_encoding_is_refused_by_its_key(value):
    with pytest.raises(UnsupportedState, match=r"the\.key"):
        values.encode(value, "the.key")


def test_a_lazily_conjugated_or_negated_tensor_is_the_one_it_shows():
    number = torch.tensor([1 + 2j, 3 - 4j]).conj()
    found = values.decode(values.encode((number, number.imag, number.imag[:1]), "the.key"), "here")

    assert torch.equal(found[0], torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(found[1], torch.tensor([-2.0, 4.0]))
    assert torch.equal(found[2], torch.tensor([-2.0]))


@st.composite
def rows_of_indexes(draw):
    """Rows as a writer makes them, and the sizes of their files."""
    keys = draw(
        st.lists(st.lists(st.text(min_size=1, max_size=4) | st.integers(0, 3), min_size=1, max_size=3), max_size=5)
    )
    rows, sizes = [], {}
    for number, steps in enumerate(keys):
        path = (f"part{number}", *(IntKey(s) if isinstance(s, int) and draw(st.booleans()) else s for s in steps))
        file = layout.item_file(draw(st.integers(0, 3)), number)
        offset, header = draw(st.integers(0, 1000)), draw(st.integers(0, 300))
        if draw(st.booleans()):
            dtype, shape = draw(st.sampled_from(sorted(ITEM_BYTES))), draw(shapes)
            num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
            block_bytes = checksums.block_bytes_for(num_bytes)
            row = StoredChunk(
                key=".".join(map(str, path)),
                path=path,
                dtype=dtype,
                shape=shape,
                box=Box((0,) * len(shape), shape),
                file=file,
                item_offset=offset,
                item_length=header + num_bytes + 10,
                data_offset=offset + header,
                block_bytes=block_bytes,
                checksums=checksums.block_checksums(bytes(num_bytes), block_bytes),
            )
        else:
            row = StoredChunk(
                key=".".join(map(str, path)),
                path=path,
                dtype=None,
                shape=(),
                box=Box((), ()),
                file=file,
                item_offset=offset,
                item_length=header,
                data_offset=offset,
                block_bytes=1024,
                checksums=checksums.block_checksums(bytes(header), 1024),
                value=values.encode(draw(hashables), "key"),
            )
        rows.append(row)
        sizes[file] = row.item_offset + row.item_length
    if draw(st.booleans()):
        rows.append(tree_row(("tree", "x"), "{}"))
    return sorted(rows, key=lambda row: (row.key, row.box.offsets)), sizes


@steady
@given(rows_of_indexes())
def test_an_index_comes_back_as_it_was(case):
    rows, sizes = case
    found = index.from_bytes(index.to_bytes(rows), "here", sizes)
    assert found == rows
    # Equal ints hide that one is a dict's key and the other a list's position.
    assert [[type(step) for step in row.path] for row in found] == [[type(s) for s in row.path] for row in rows]


def test_long_checksums_that_were_read_are_those_that_were_written_wherever_they_are_sent():
    shape, num_blocks = (50_000,), 196
    row = StoredChunk(
        key="t",
        path=("t",),
        dtype="float32",
        shape=shape,
        box=Box((0,), shape),
        file=layout.item_file(0, 0),
        item_offset=0,
        item_length=200_000,
        data_offset=0,
        block_bytes=1024,
        checksums=random.Random(0).randbytes(8 * num_blocks),
    )
    (found,) = index.from_bytes(index.to_bytes([row]), "here", {row.file: 200_000})
    assert isinstance(found.checksums, memoryview)
    assert found == row == pickle.loads(pickle.dumps(found))
    assert len({found, row}) == 1
    assert index.to_bytes([found]) == index.to_bytes([row])


@settings(steady, max_examples=300)
@given(rows_of_indexes(), st.data())
def test_a_damaged_index_is_read_or_refused(case, data):
    rows, sizes = case
    content = bytearray(index.to_bytes(rows))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    try:
        found = index.from_bytes(bytes(content), "here", sizes)
    except DamagedCheckpoint as error:
        assert "here" in str(error)  # noqa: PT017 - most examples raise, and those that do not are checked below
    else:
        assert all(row.is_tree or row.item_offset + row.item_length <= sizes[row.file] for row in found)


numbers = st.integers(0, 2**63 - 1)
manifests = st.builds(
    Manifest,
    step=numbers,
    samples=numbers,
    world_size=st.integers(1, 2**31),
    attempt=st.text(max_size=8),
    parts=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    files=st.dictionaries(
        st.builds(layout.item_file, st.integers(0, 10**9 - 1), st.integers(0, 99)),
        st.builds(StoredFile, size=st.integers(0, 2**60), xxh3=st.just("0123456789abcdef")),
        max_size=3,
    ).map(lambda files: {**files, layout.INDEX: StoredFile(size=1, xxh3="0")}),
    mesh=st.lists(st.dictionaries(st.text(max_size=4), st.integers(1, 99), max_size=2), max_size=2).map(tuple),
    versions=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
    created_s=st.floats(allow_nan=False, allow_infinity=False),
)


@steady
@given(manifests)
def test_a_manifest_comes_back_as_it_was(manifest):
    assert Manifest.from_json(manifest.to_json(), "here") == manifest


@settings(steady, max_examples=300)
@given(manifests, st.data())
def test_a_damaged_manifest_is_refused_or_the_same(manifest, data):
    content = bytearray(manifest.to_json())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.integers(0, 3)) == 0:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    try:
        found = Manifest.from_json(bytes(content), "here")
    except DamagedCheckpoint as error:
        assert "here" in str(error)  # noqa: PT017 - most examples raise, and the others are checked below
    else:
        assert found == manifest


def test_files_whose_positions_in_a_row_are_beyond_64_bits_are_refused():
    files = {layout.INDEX: StoredFile(size=0, xxh3="0")}
    files |= {layout.item_file(rank, 0): StoredFile(size=2**61, xxh3="0") for rank in range(2)}
    manifest = Manifest(step=1, samples=1, world_size=2, attempt="", parts=(), files=files)

    assert Manifest.from_json(manifest.to_json(), "here") == manifest
    files[layout.INDEX] = StoredFile(size=1, xxh3="0")
    with pytest.raises(HostileCheckpoint, match="together"):
        Manifest.from_json(manifest.to_json(), "here")


def test_a_newer_manifest_says_what_to_install():
    manifest = Manifest(
        step=1, samples=1, world_size=1, attempt="", parts=(), files={layout.INDEX: StoredFile(size=1, xxh3="0")}
    )
    newer = dataclasses.replace(manifest, format=layout.FORMAT_VERSION + 1).to_json()
    with pytest.raises(UnknownFormat, match="newer ray-stateful"):
        Manifest.from_json(newer, "here")


@steady
@given(tensors())
def test_torch_loads_a_tensor_between_its_header_and_trailer(tensor):
    header, trailer = envelope(tensor.dtype, tuple(tensor.shape))
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    # A restore reads along what lies between small tensors.
    assert len(header) + len(trailer) <= 512
    found = torch.load(io.BytesIO(header + raw + trailer), weights_only=True)
    assert same(found, tensor)


@pytest.mark.parametrize("num_bytes", [2**32 - 512, 2**32 - 400, 2**32 - 2, 2**32 - 1, 2**32, 2**32 + 1])
def test_torch_loads_a_tensor_on_either_side_of_what_a_zip_of_32_bits_holds(tmp_path, num_bytes):
    header, trailer = envelope(torch.uint8, (num_bytes,))
    path = tmp_path / "item"
    with path.open("wb") as file:
        file.write(header + b"\x05")
        file.seek(num_bytes - 2, os.SEEK_CUR)  # a hole: it takes no room on the disk
        file.write(b"\x07" + trailer)

    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("t/data/0").file_size == num_bytes
    # Mapped, as it would not fit in memory twice.
    found = torch.load(path, weights_only=True, mmap=True)
    assert (found.shape, found[0].item(), found[-1].item()) == ((num_bytes,), 5, 7)


@steady
@given(st.integers(0, layout.MAX_STEP), st.binary(min_size=3, max_size=16))
def test_a_name_comes_back_as_it_was(step, attempt):
    name = layout.CheckpointName(step, attempt.hex())
    assert layout.parse_name(str(name)) == name
    for other in (f"{name}.tmp", f"{name}\n", f" {name}", str(name)[1:], str(name).upper()):
        assert layout.parse_name(other) is None


@pytest.mark.parametrize("step", [0, 7, 10**9 - 1])
def test_only_the_names_that_are_made_are_names(step):
    assert layout.is_item_file(layout.item_file(step, step))
    assert layout.is_rank_key(layout.rank_key(step))
    for other in (
        f"__{step}_0.distcp\n",
        f"__{step}_0.distcp.tmp",
        f"__-{step}_0.distcp",
        f"a/__{step}_0.distcp",
        "__\u0661_0.distcp",
    ):
        assert not layout.is_item_file(other)
    for other in (f"rank_0{step}", f"rank_-{step}", f"rank_{step}\n", step, "rank_\u0661", "rank_"):
        assert not layout.is_rank_key(other)


@steady
@given(shapes)
def test_strides_are_those_of_numpy(shape):
    assert tuple(s // 8 for s in np.empty(shape).strides) == strides_of(shape)
