"""The model states that are saved and restored: a transformer's shapes, sharded along dim 0, with Adam's moments.

No step is ever trained: every element is its own position in the whole tensor, so that what comes back can be checked
on any number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

_MATRICES = {"attention_in": (1, 1), "attention_out": (1, 1), "up": (4, 1), "down": (1, 4)}
_VECTORS = ("attention_norm", "feed_forward_norm")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True)
class Size:
    """How large a state is: parameters and two moments together, float32."""

    num_bytes: int
    num_layers: int

    @property
    def width(self) -> int:
        """Of the model, such that its ten squares a layer come to `num_bytes`; not a multiple of every world size."""
        return max(8, int((self.num_bytes / (12 * 10 * self.num_layers)) ** 0.5) // 2 * 2)

    @property
    def num_tensors(self) -> int:
        return 3 * (len(_MATRICES) + len(_VECTORS)) * self.num_layers

    def __str__(self) -> str:
        return f"{self.num_bytes / 1e9:g} GB in {self.num_tensors} tensors"


# Some 300 and some 3,000 tensors.
FEW, MANY = 17, 167


class Layer(nn.Module):
    def __init__(self, width: int, mesh: DeviceMesh) -> None:
        super().__init__()
        for name, (rows, columns) in _MATRICES.items():
            self.register_parameter(name, nn.Parameter(_sharded((rows * width, columns * width), mesh)))
        for name in _VECTORS:
            self.register_parameter(name, nn.Parameter(_sharded((width,), mesh)))


class Model(nn.Module):
    def __init__(self, size: Size, device: str) -> None:
        super().__init__()
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        self.layers = nn.ModuleList(Layer(size.width, mesh) for _ in range(size.num_layers))


def build(size: Size, device: str = "cpu") -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer, filled; collective."""
    model = Model(size, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        state = {name: torch.empty_like(parameter) for name in _MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(7.0), **state}
    fill(model, optimizer)
    return model, optimizer


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[DTensor]:
    """Every tensor but the counters."""
    found = []
    for parameter in model.parameters():
        state = optimizer.state[parameter]
        found += [parameter.detach(), *(state[name] for name in _MOMENTS)]
    return found


def fill(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for number, tensor in enumerate(tensors(model, optimizer)):
        tensor.to_local().copy_(_expected(tensor, number))


def clear(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """So that what is there afterwards was read."""
    for tensor in tensors(model, optimizer):
        tensor.to_local().fill_(-1.0)


def check(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every element is what `fill` made it, or an AssertionError."""
    for number, tensor in enumerate(tensors(model, optimizer)):
        assert torch.equal(tensor.to_local().cpu(), _expected(tensor, number)), f"tensor {number} came back wrong"


def local_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of this rank's shards."""
    return sum(tensor.to_local().nbytes for tensor in tensors(model, optimizer))


def _sharded(shape: tuple[int, ...], mesh: DeviceMesh) -> DTensor:
    first, stop = _rows(shape[0])
    local = torch.zeros((stop - first, *shape[1:]), device=mesh.device_type)
    stride = (shape[1], 1) if len(shape) == 2 else (1,)
    return DTensor.from_local(
        local,
        mesh,
        [Shard(0)],
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,  # type: ignore[arg-type]
    )


def _rows(size: int) -> tuple[int, int]:
    """First and past-the-last row of this rank, as `torch.chunk` deals them."""
    share = -(-size // dist.get_world_size())
    first = min(size, dist.get_rank() * share)
    return first, min(size, first + share)


def _expected(tensor: DTensor, number: int) -> torch.Tensor:
    local = tensor.to_local()
    first, _ = _rows(tensor.shape[0])
    columns = tensor.shape[1] if tensor.ndim == 2 else 1
    start = first * columns
    values = torch.arange(start, start + local.numel(), dtype=torch.int64) * 31 + number
    return (values % 8_388_593).to(torch.float32).view(local.shape)
