"""Whatever grid of chunks a tensor was written in, any box of it is read exactly, and few bytes besides."""

import math
import posixpath

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_stateful.errors import DamagedCheckpoint
from ray_stateful.format import checksums
from ray_stateful.format.chunks import Box, intersection
from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.rows import StoredChunk
from ray_stateful.storage.local import LocalStorage
from ray_stateful.storage.ranges import ReadLimits, fetches_of, pieces_of
from ray_stateful.storage.reading import Request, read

steady = settings(
    derandomize=True, deadline=None, max_examples=60, database=None, suppress_health_check=list(HealthCheck)
)
limits = st.builds(
    ReadLimits,
    max_fetch_bytes=st.sampled_from([1, 100, 3000, 1 << 20]),
    max_gap_bytes=st.sampled_from([0, 64, 16 << 10]),
    num_threads=st.sampled_from([1, 4]),
)


def shards(shape, counts):
    """The boxes of a mesh with `counts` ranks along each dim, as torch chunks: uneven, the last ones empty."""
    boxes = [Box((), ())]
    for size, count in zip(shape, counts, strict=True):
        step = -(-size // count)
        spans = [(min(n * step, size), min((n + 1) * step, size)) for n in range(count)]
        boxes = [Box((*b.offsets, start), (*b.sizes, stop - start)) for b in boxes for start, stop in spans]
    return [box for box in boxes if box.num_elements]


@st.composite
def tensors_in_chunks(draw):
    """A tensor's raw elements, and its chunks: a 1-D or 2-D mesh over dims of any size."""
    num_dims = draw(st.integers(0, 3))
    shape = tuple(draw(st.integers(1, 60 if num_dims < 3 else 12)) for _ in range(num_dims))
    counts = [1] * num_dims
    for dim in draw(st.permutations(range(num_dims)))[: draw(st.integers(0, 2))]:
        counts[dim] = draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(["uint8", "bfloat16", "float32", "int64", "complex128"]))
    return dtype, shape, shards(shape, counts)


def stored(directory, dtype, shape, boxes, elements):
    """Write the chunks to two files, with gaps between them, as a writer would."""
    files, rows = {"__0_0.distcp": bytearray(), "__1_0.distcp": bytearray()}, []
    for number, box in enumerate(boxes):
        name = f"__{number % 2}_0.distcp"
        raw = elements[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))].tobytes()
        begins = len(files[name])
        files[name] += b"header" * (1 + number) + raw + b"trailer"
        block_bytes = checksums.block_bytes_for(elements.nbytes)
        rows.append(
            StoredChunk(
                key="t",
                path=("t",),
                dtype=dtype,
                shape=shape,
                box=box,
                file=name,
                item_offset=begins,
                item_length=len(files[name]) - begins,
                data_offset=begins + 6 * (1 + number),
                block_bytes=block_bytes,
                checksums=checksums.block_checksums(raw, block_bytes),
            )
        )
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return rows


def requests_for(rows, box, into):
    for row in rows:
        shared = intersection(row.box, box)
        if shared is not None:
            target = into
            for dim, (offset, size) in enumerate(zip(shared.relative_to(box).offsets, shared.sizes, strict=True)):
                target = target.narrow(dim, offset, size)
            yield Request(row, shared.relative_to(row.box), target)


@steady
@given(tensors_in_chunks(), limits, st.data())
def test_any_box_of_any_grid_is_read_bit_for_bit(tmp_path_factory, case, limits, data):
    dtype, shape, boxes = case
    directory = tmp_path_factory.mktemp("chunks")
    raw = np.random.default_rng(len(boxes)).bytes(math.prod(shape) * ITEM_BYTES[dtype])
    elements = np.frombuffer(raw, dtype=f"V{ITEM_BYTES[dtype]}").reshape(shape)
    rows = stored(directory, dtype, shape, boxes, elements)
    new = shards(shape, [data.draw(st.integers(1, 4)) for _ in shape])
    for box in new:
        into = torch.zeros(box.sizes, dtype=getattr(torch, dtype))
        requests = list(requests_for(rows, box, into))

        statistics = read(LocalStorage(), str(directory), {"part": requests}, limits)["part"]

        wanted = elements[tuple(slice(o, o + n) for o, n in zip(box.offsets, box.sizes, strict=True))].tobytes()
        assert into.reshape(-1).view(torch.uint8).numpy().tobytes() == wanted
        assert statistics.bytes_wanted == len(wanted)


@steady
@given(tensors_in_chunks(), limits)
def test_what_is_fetched_holds_every_piece_and_is_within_the_limits(tmp_path_factory, case, limits):
    dtype, shape, boxes = case
    elements = np.zeros(shape, dtype=f"V{ITEM_BYTES[dtype]}")
    rows = stored(tmp_path_factory.mktemp("chunks"), dtype, shape, boxes, elements)
    pieces = [
        piece
        for number, row in enumerate(rows)
        for piece in pieces_of(row, Box((0,) * len(shape), row.box.sizes), number, limits)
    ]
    fetches = fetches_of(pieces, limits)
    assert sum(len(fetch.pieces) for fetch in fetches) == len(pieces)
    for fetch in fetches:
        spans = [piece.file_span for piece in fetch.pieces]
        assert fetch.start == min(start for start, _ in spans)
        assert fetch.stop == max(stop for _, stop in spans)
        # A block is read whole, at either end; else a fetch is no longer than asked for.
        assert fetch.stop - fetch.start <= limits.max_fetch_bytes + 2 * checksums.MAX_BLOCK_BYTES


@steady
@given(tensors_in_chunks(), st.data())
def test_a_flipped_bit_of_any_chunk_is_found_by_whoever_reads_it(tmp_path_factory, case, data):
    dtype, shape, boxes = case
    directory = tmp_path_factory.mktemp("chunks")
    elements = np.zeros(shape, dtype=f"V{ITEM_BYTES[dtype]}")
    rows = stored(directory, dtype, shape, boxes, elements)
    row = data.draw(st.sampled_from(rows))
    path = posixpath.join(str(directory), row.file)
    with open(path, "rb") as file:
        content = bytearray(file.read())
    content[row.data_offset + data.draw(st.integers(0, row.num_bytes - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with open(path, "wb") as file:
        file.write(content)
    into = torch.zeros(shape, dtype=getattr(torch, dtype))

    with pytest.raises(DamagedCheckpoint, match="not what was written"):
        read(LocalStorage(), str(directory), {"part": list(requests_for(rows, Box((0,) * len(shape), shape), into))})
