"""What replicas send each other: everything once, in buckets of bounded size."""

from unittest.mock import patch

import pytest
import torch

from ray_stateful.storage import sharing
from ray_stateful.storage.reading import Request
from tests.rows import tensor_row


def request_of(number, tensor):
    row = tensor_row(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), f"k{number:05}")
    return Request(row, row.box, tensor)


def shared_by_two(tensors):
    """What rank 0 of two replicas shares of `tensors`."""
    classes = sharing.classes_of([request_of(number, tensor) for number, tensor in enumerate(tensors)], [])
    return sharing.share(classes, [sharing.digests(classes)] * 2, 0)


def targets(bucket):
    return [getattr(one, "into", one) for one in bucket]


@pytest.mark.parametrize("shape", [(300,), (8, 40), (1, 300), (2, 3, 50), (1, 1, 2, 70), (3, 16), (), (0, 5)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_no_bucket_is_larger_than_is_sent_at_once_and_all_is_sent_once(monkeypatch, shape, is_transposed):
    monkeypatch.setattr(sharing, "_BUCKET_BYTES", 64)
    tensors = [torch.zeros(shape, dtype=dtype) for dtype in (torch.float32, torch.int16)]
    tensors = [tensor.mT if is_transposed and tensor.dim() > 1 else tensor for tensor in tensors]
    (group,) = shared_by_two(tensors).groups

    for _, bucket in sharing._buckets(group):
        assert 0 < sum(tensor.nbytes for tensor in targets(bucket)) <= 64
        for tensor in targets(bucket):
            # Views, so what is copied to them arrives.
            tensor += 1

    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in tensors)


def test_each_tensor_is_measured_a_few_times_however_many_are_sent_together():
    class Measured:
        """Stands in for a part of a tensor, and counts how often it is asked for its size."""

        times = 0

        @property
        def nbytes(self):
            Measured.times += 1
            return 4

    shared = shared_by_two([torch.zeros(()) for _ in range(2000)])

    with patch.object(sharing, "_parts", side_effect=lambda tensor: [Measured()]):
        (bucket,) = [bucket for _, bucket in sharing._buckets(shared.groups[0])]

    assert len(bucket) == 2000
    assert 2000 <= Measured.times <= 4 * 2000
