"""Makes a golden checkpoint of the present format: `python -m tests.compat.make_golden NAME`.

Run once, when a format is released, as `format_1`; and when what is written changes within it, as `format_1_` and what
is new. What lies in `golden/` is never made again: every later version must read it as it is.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from attacks.victim import PerRank
from ray_stateful import checkpoint
from ray_stateful.format.layout import FORMAT_VERSION
from ray_stateful.testing import run_ranks

GOLDEN = Path(__file__).parent / "golden"
NUM_RANKS = 2


class Free:
    """A part that is whatever it was given."""

    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, value: Any) -> None:
        self.value = value


def expected() -> dict[str, Any]:
    """What the golden checkpoint holds; from arithmetic alone, which no version of torch does otherwise."""
    return {
        "weights": torch.arange(15, dtype=torch.float32).reshape(5, 3) / 4,
        "bias": torch.arange(3).to(torch.bfloat16),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "nothing": torch.empty(0, 4),
        "layers": [torch.arange(2), {"deep": torch.arange(3, dtype=torch.int8)}],
        "values": {
            "betas": (0.9, 0.999),
            "milestones": Counter({30: 1, 80: 2}),
            "names": {"a", "b"},
            "raw": b"\x00\xff",
            "not_a_number": float("nan"),
            "array": np.arange(3, dtype=np.uint16),
            "number": np.float64(1.5),
            "dtype": torch.bfloat16,
            "tensors": (torch.arange(2),),
        },
        "lr": 0.125,
    }


def save(run: str) -> str:
    """On each rank: rows of the weights, the rest replicated, and a value of its own."""
    value = expected()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
    sharded: DTensor = distribute_tensor(value["weights"], mesh, [Shard(0)])
    state = {"thing": Free({**value, "weights": sharded}), "stream": PerRank(10 + dist.get_rank())}
    return checkpoint.save(state, step=12, samples=96, run=run, num_files=1).name


def main(name: str) -> None:
    if not re.fullmatch(rf"format_{FORMAT_VERSION}(_[a-z_]+)?", name):
        raise SystemExit(f"{name!r} is no name for a checkpoint of format {FORMAT_VERSION}")
    directory = GOLDEN / name
    if directory.exists():
        raise SystemExit(f"{directory} is there already, and is to stay as it is")
    outcomes = run_ranks(NUM_RANKS, save, str(directory))
    failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if failed:
        shutil.rmtree(directory, ignore_errors=True)
        raise failed[0]
    print(*sorted(path.relative_to(GOLDEN) for path in directory.rglob("*")), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])
