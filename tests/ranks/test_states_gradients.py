import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from ray_stateful.states.batches import GlobalBatchSampler
from ray_stateful.states.gradients import accumulate
from ray_stateful.testing import run_ranks

DATA = torch.randn(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()


def wrap(kind):
    if kind == "plain":
        return build()
    if kind == "ddp":
        return DistributedDataParallel(build())
    if kind == "ddp inside":
        return nn.Sequential(DistributedDataParallel(build()))
    if kind.startswith("fsdp1"):
        return wrap_fsdp1(kind)
    model = build()
    fully_shard(model[0])
    if kind == "fsdp below an unsharded root":
        # The rest is the same on every rank only because it is not reduced at all: it is left out of the comparison.
        fully_shard(model[2])
        return model
    return fully_shard(model)


def wrap_fsdp1(kind):
    # FSDP1 announces its end; people have it all the same.
    warnings.simplefilter("ignore")
    options = {"device_id": torch.device("cpu"), "use_orig_params": True}
    model = build()
    model[0] = FullyShardedDataParallel(model[0], **options)
    model = FullyShardedDataParallel(model, **options)
    return torch.compile(nn.Sequential(model), backend="eager") if kind == "fsdp1 inside" else model


class Reductions(TorchDispatchMode):
    """Counts the calls that add up over ranks, DDP's from C++ too."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += any(
            name in str(func) for name in ("c10d.allreduce", "c10d._reduce_scatter", "c10d.reduce_scatter")
        )
        return func(*args, **kwargs or {})


def one_step(model, micros):
    with Reductions() as reductions:
        for micro in micros:
            (model(DATA[micro.indices]).sum() * micro.loss_scale).backward()
    return reductions.count


def gradients(model):
    if FullyShardedDataParallel.fsdp_modules(model):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return [p.grad.clone() for p in model.parameters()]
    grads = [p.grad for p in model.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]


def count_reductions(kind):
    # A global batch of 20 on 3 ranks is 7 + 7 + 6; in micro-batches of 2, four each.
    batch = next(iter(GlobalBatchSampler(20, global_batch_size=20, micro_batch_size=2)))
    whole = build()
    whole(DATA).mean().backward()
    expected = gradients(whole)
    counts = {}
    for way in ("held back", "every time"):
        model = wrap(kind)
        counts[way] = one_step(model, accumulate(model, batch) if way == "held back" else batch)
        for ours, theirs in zip(gradients(model), expected, strict=True):
            # Another order of a sum of 20 numbers.
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    once = one_step(model, accumulate(model, batch.micro_batches[:1]))
    return len(batch), counts["held back"], counts["every time"], once


@pytest.mark.parametrize("kind", ["ddp", "ddp inside", "fsdp", "fsdp below an unsharded root", "fsdp1", "fsdp1 inside"])
def test_gradients_are_reduced_with_the_last_micro_batch_only_and_are_the_exact_mean(kind):
    outcomes = run_ranks(3, count_reductions, kind)

    num_micro, held_back, every_time, once = outcomes[0]
    assert outcomes == [outcomes[0]] * 3
    assert num_micro == 4
    assert held_back == once > 0
    assert every_time == 4 * once


def leave_early():
    model = wrap("fsdp")
    batch = next(iter(GlobalBatchSampler(20, global_batch_size=20, micro_batch_size=2)))
    for _ in accumulate(model, batch):
        break
    return one_step(model, batch.micro_batches[:1])


def test_a_loop_that_is_left_early_does_not_leave_reduction_off():
    assert all(count > 0 for count in run_ranks(2, leave_early))


def test_a_model_on_one_worker_needs_nothing():
    model = copy.deepcopy(build())
    batch = next(iter(GlobalBatchSampler(20, global_batch_size=20, micro_batch_size=6)))

    assert list(accumulate(model, batch)) == list(batch)
    assert not dist.is_initialized()
