"""Finding the bytes of a tensor in what stock `torch.save` wrote, from its first bytes alone."""

import io
import pickle

import pytest
import torch

from ray_stateful.format.dtypes import ITEM_BYTES
from ray_stateful.format.stock_item import HEAD_BYTES, data_position
from ray_stateful.format.torch_item import envelope


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize("dtype", [name for name in ITEM_BYTES if hasattr(torch, name)])
@pytest.mark.parametrize("sizes", [(), (0,), (5,), (3, 1), (2, 3, 4), (2, 1, 2, 3, 1), (40_000,)])
def test_the_bytes_of_every_dtype_and_rank_are_found(dtype, sizes):
    kind = getattr(torch, dtype)
    tensor = torch.randint(0, 2, (torch.Size(sizes).numel() * ITEM_BYTES[dtype],), dtype=torch.uint8)
    tensor = tensor.view(kind).reshape(sizes)
    item = saved(tensor)

    position = data_position(item[:HEAD_BYTES], dtype, sizes)

    assert position is not None
    found = bytearray(item[position : position + tensor.numel() * tensor.element_size()])
    assert found == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("sizes", [(), (0,), (5,), (2, 3, 4), (40_000,)])
def test_the_bytes_within_our_own_archive_are_found_as_well(sizes):
    header, trailer = envelope(torch.bfloat16, sizes)
    item = header + bytes(2 * torch.Size(sizes).numel()) + trailer
    assert data_position(item[:HEAD_BYTES], "bfloat16", sizes) == len(header)


def test_a_tensor_that_begins_within_its_storage_is_found_there():
    whole = torch.arange(100.0)
    item = saved(whole[10:20])
    position = data_position(item[:HEAD_BYTES], "float32", (10,))
    assert torch.equal(torch.frombuffer(bytearray(item[position : position + 40]), dtype=torch.float32), whole[10:20])


@pytest.mark.parametrize(
    ("value", "dtype", "sizes"),
    [
        (torch.ones(4, 6).t(), "float32", (6, 4)),
        (torch.ones(4), "float32", (5,)),
        (torch.ones(4), "float64", (4,)),
        (torch.nn.Parameter(torch.ones(4)), "float32", (4,)),
        ([torch.ones(4)], "float32", (4,)),
        ({"a": 1}, "float32", (4,)),
    ],
    ids=["transposed", "other sizes", "other dtype", "a parameter", "a list", "no tensor"],
)
def test_what_is_not_just_that_tensor_is_left_to_those_who_read_all_of_it(value, dtype, sizes):
    assert data_position(saved(value)[:HEAD_BYTES], dtype, sizes) is None


def test_no_head_makes_it_do_more_than_say_no():
    item = saved(torch.arange(10.0))
    for cut in range(len(item)):
        position = data_position(item[:cut], "float32", (10,))
        assert position is None or item[position : position + 40] == torch.arange(10.0).numpy().tobytes()
    assert data_position(pickle.dumps(print), "float32", (10,)) is None
    assert data_position(b"", "float32", ()) is None
    for at in range(0, 700, 3):
        changed = bytearray(item[:HEAD_BYTES])
        changed[at] ^= 0xFF
        position = data_position(bytes(changed), "float32", (10,))
        # It never raises; whether a place lies within the item is for the caller to see.
        assert position is None or position > 0
