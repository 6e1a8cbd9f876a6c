"""Metrics become plain JSON, or are refused by name."""

from __future__ import annotations

import enum
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from ray_stateful.plain_metrics import plain_metrics


class _Level(enum.IntEnum):
    HIGH = 3


def test_values_of_one_number_become_python_numbers():
    plain = plain_metrics(
        {
            "float32": np.float32(0.5),
            "float64": np.float64(0.5),
            "int64": np.int64(7),
            "bool": np.bool_(True),
            "str": np.str_("x"),
            "array": np.array(2.5),
            "tensor": torch.tensor(2.5, dtype=torch.bfloat16),
            "parameter": torch.nn.Parameter(torch.tensor(1.0)),
            "enum": _Level.HIGH,
            "none": None,
            "nan": np.float32("nan"),
            "inf": float("-inf"),
            "nested": {"list": [np.int8(1), (torch.tensor(2),)]},
        }
    )

    assert math.isnan(plain.pop("nan"))
    assert plain == {
        "float32": 0.5,
        "float64": 0.5,
        "int64": 7,
        "bool": True,
        "str": "x",
        "array": 2.5,
        "tensor": 2.5,
        "parameter": 1.0,
        "enum": 3,
        "none": None,
        "inf": -math.inf,
        "nested": {"list": [1, [2]]},
    }
    assert {type(value) for value in plain.values()} == {float, int, bool, str, type(None), dict}
    json.dumps(plain)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (torch.ones(2), "'loss' is a torch.Tensor of shape (2,)"),
        (np.ones((1,)), "'loss' is a numpy.ndarray of shape (1,)"),
        (np.datetime64("2020-01-01"), "'loss' is a numpy.datetime64"),
        (1j, "'loss' is a builtins.complex"),
        (object(), "'loss' is a builtins.object"),
        (b"x", "'loss' is a builtins.bytes"),
        ({1}, "'loss' is a builtins.set"),
        ({"a": [1, 1j]}, "'loss.a[1]' is a builtins.complex"),
        ({1: 2}, "loss: key 1 is a int"),
        ("name\udcff", "'loss': the text 'name\\udcff' is not valid Unicode"),
    ],
)
def test_what_json_has_no_word_for_is_refused_by_name(value, named):
    with pytest.raises(ValueError, match="metric") as refused:
        plain_metrics({"fine": 1, "loss": value})
    assert named in str(refused.value)


def test_a_process_that_is_no_ray_worker_does_not_import_ray():
    code = (
        "import sys; from ray_stateful import ray_train, save_requests;"
        "assert ray_train.current_run() is None; assert ray_train.preemption() is None;"
        "assert save_requests.save_requested() == 0;"
        "assert not [name for name in sys.modules if name == 'ray' or name.startswith('ray.')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
