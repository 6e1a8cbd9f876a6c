"""FSDP2 on a CUDA device with NCCL: staging to pinned memory on a stream of its own, and round trips bit for bit."""

import pytest
import torch
from torch import nn

from ray_stateful import Checkpointer, ModelState, OptimizerState, checkpoint
from ray_stateful.storage.staging import Staging

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # CUDA's own, of the order in which its libraries are loaded, come out of threads of autograd.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module", autouse=True)
def nccl_world_of_one(tmp_path_factory):
    rendezvous = tmp_path_factory.mktemp("world") / "rendezvous"
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def build(seed, width=512):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)).cuda()
    fully_shard(model, mesh=init_device_mesh("cuda", (1,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer


def train(model, optimizer, steps):
    for step in range(steps):
        torch.manual_seed(step)
        model(torch.randn(64, 512, device="cuda")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(model, optimizer):
    tensors = list(model.parameters())
    tensors += [value for entry in optimizer.state.values() for value in entry.values()]
    # Step counts are on the host already, and are counted on there.
    return [getattr(value, "full_tensor", lambda value=value: value)().cpu().clone() for value in tensors]


def state_of(model, optimizer):
    return {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}


def test_a_checkpoint_of_a_device_comes_back_bit_for_bit(tmp_path):
    objects = build(1)
    train(*objects, 3)
    checkpoint.save(state_of(*objects), step=3, run=str(tmp_path))
    fresh = build(2)

    checkpoint.restore(state_of(*fresh), run=str(tmp_path))

    assert all(torch.equal(a, b) for a, b in zip(whole(*fresh), whole(*objects), strict=True))


def test_a_background_save_holds_the_values_of_its_step_although_training_went_on(tmp_path):
    objects = build(1)
    train(*objects, 2)
    with Checkpointer(state_of(*objects), every_n_steps=1, background=True, at_end=False, run=str(tmp_path)) as saver:
        expected = whole(*objects)
        saver.step()
        train(*objects, 5)
    fresh = build(2)

    checkpoint.restore(state_of(*fresh), run=str(tmp_path))

    assert all(torch.equal(a, b) for a, b in zip(whole(*fresh), expected, strict=True))


def test_staging_copies_to_pinned_buffers_that_are_used_again():
    staging = Staging()
    tensor = torch.randn(1 << 20, device="cuda")
    before = tensor.cpu()
    first = staging.fill({"t": tensor})
    tensor.add_(1)  # ordered after the copy on the device
    first.wait()
    copied = first.get("t", None)
    assert copied.is_pinned()
    assert torch.equal(copied, before)

    second = staging.fill({"t": tensor})
    second.wait()

    assert second.get("t", None).data_ptr() == copied.data_ptr()
    assert torch.equal(second.get("t", None), tensor.cpu())


def test_staging_waits_for_what_training_has_queued_and_training_for_staging():
    staging = Staging()
    tensor = torch.zeros(64 << 20, device="cuda")
    staging.fill({"t": tensor}).wait()  # the buffer is pinned by now: what follows is a queue, and nothing but that

    # Some tenths of a second, in which the host runs ahead of the device.
    torch.cuda._sleep(200_000_000)
    tensor.fill_(1)
    staged = staging.fill({"t": tensor})
    tensor.fill_(2)
    staged.wait()

    assert staged.get("t", None).eq(1).all()


def test_a_save_and_a_restore_on_a_stream_of_the_users_own_wait_for_it(tmp_path):
    class Part:
        def __init__(self):
            self.t = torch.zeros(16 << 20, device="cuda")

        def state_dict(self):
            return {"t": self.t}

        def load_state_dict(self, state_dict):
            self.t = state_dict["t"]

    part, fresh = Part(), Part()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        part.t.fill_(1)
        checkpoint.save({"part": part}, step=1, run=str(tmp_path))
        torch.cuda._sleep(200_000_000)
        fresh.t.fill_(7)
        checkpoint.restore({"part": fresh}, run=str(tmp_path))
        restored = fresh.t.clone()
    torch.cuda.synchronize()

    assert restored.eq(1).all()


def test_a_default_device_is_not_where_host_buffers_are_made(tmp_path):
    objects, fresh = build(1), build(2)
    train(*objects, 2)
    with torch.device("cuda"):
        with Checkpointer(state_of(*objects), every_n_steps=1, background=True, run=str(tmp_path)) as saver:
            saver.step()
        checkpoint.restore(state_of(*fresh), run=str(tmp_path))

    assert all(torch.equal(a, b) for a, b in zip(whole(*fresh), whole(*objects), strict=True))
