"""These tests are of the host, also where there is a device."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fully_shard` without a mesh takes an accelerator if there is one; ranks have the environment of the test."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
