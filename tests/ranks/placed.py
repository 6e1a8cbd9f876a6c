"""A part whose tensors lie over a mesh of all ranks, and which knows what they should hold."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from ray_stateful.states.part import Reconciled, StrictPart


class Whole(StrictPart):
    """A part of the tensors it was given, which are filled where they are."""

    def __init__(self, tensors):
        self.tensors = tensors

    def state_dict(self):
        return self.tensors

    def load_state_dict(self, state_dict):
        pass

    def reconcile(self, missing, unexpected):
        return Reconciled(problems=tuple(sorted(missing | unexpected)))


class Placed(Whole):
    """The tensors `values`, placed over a mesh; scalars and `plain` are ordinary tensors.

    What has no second dim is replicated where others are sharded along it.
    """

    def __init__(self, values, mesh_shape, placements, filled):
        mesh = init_device_mesh("cpu", mesh_shape)
        super().__init__({})
        self.values = values
        for name, value in values.items():
            mine = value.clone() if filled else torch.zeros_like(value)
            here = placements if value.dim() > 1 else [Replicate() if p == Shard(1) else p for p in placements]
            is_plain = name == "plain" or value.dim() == 0
            self.tensors[name] = mine if is_plain else distribute_tensor(mine, mesh, here)

    def is_right(self):
        found = {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in self.tensors.items()}
        return all(torch.equal(found[name], value) for name, value in self.values.items())


def counted(shapes, bfloat16):
    """A tensor of each shape, whose elements count up; those whose names are in `bfloat16` are of that dtype."""
    found = {}
    for name, shape in shapes.items():
        values = torch.arange(float(torch.Size(shape).numel())).reshape(shape) + len(name)
        found[name] = values.bfloat16() if name in bfloat16 else values
    return found
