"""Checkpoints of every released format, as they lie in git, are read by this version, and damaged ones are not."""

import shutil

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from attacks.victim import PerRank
from ray_stateful import checkpoint
from ray_stateful.errors import NoIntactCheckpoint
from ray_stateful.format.layout import FORMAT_VERSION
from ray_stateful.storage.uris import resolve
from tests.compat.make_golden import GOLDEN, Free, expected


def version_of(golden):
    return int(golden.split("_")[1])


RUNS = sorted((path.name for path in GOLDEN.iterdir()), key=lambda golden: (version_of(golden), golden))
FILES = sorted(path.name for path in next((GOLDEN / RUNS[-1]).iterdir()).iterdir())


def fresh():
    return {"thing": Free(), "stream": PerRank(0)}


def copied(tmp_path, golden):
    """A copy of the golden run; returns it and the directory of its checkpoint."""
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / golden, run)
    return run, next(run.iterdir())


def assert_same(found, wanted, where):
    assert type(found) is type(wanted), where
    if isinstance(wanted, torch.Tensor):
        assert found.dtype == wanted.dtype, where
        assert torch.equal(found, wanted), where
    elif isinstance(wanted, np.ndarray):
        assert found.dtype == wanted.dtype, where
        assert np.array_equal(found, wanted), where
    elif isinstance(wanted, dict):
        assert set(found) == set(wanted), where
        for key in wanted:
            assert_same(found[key], wanted[key], f"{where}[{key!r}]")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), where
        for number, item in enumerate(wanted):
            assert_same(found[number], item, f"{where}[{number}]")
    else:
        assert found == wanted or (found != found and wanted != wanted), where


def test_there_is_a_golden_checkpoint_of_the_present_format():
    assert version_of(RUNS[-1]) == FORMAT_VERSION
    assert f"format_{FORMAT_VERSION}" in RUNS


@pytest.mark.parametrize("golden", RUNS)
def test_a_golden_checkpoint_is_restored_bit_for_bit(golden):
    state = fresh()
    report = checkpoint.restore(state, run=str(GOLDEN / golden), verify="full")

    assert (report.step, report.samples, report.saved_world_size, report.verified) == (12, 96, 2, True)
    assert_same(state["thing"].value, expected(), "thing")
    assert state["stream"].number == 10 + 11


# One process without a process group is what is tested.
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("golden", RUNS)
def test_stock_dcp_loads_a_golden_checkpoint(golden):
    found = {"thing": {"weights": torch.zeros(5, 3), "lr": 0.0}}
    dcp.load(found, checkpoint_id=str(next((GOLDEN / golden).iterdir())), no_dist=True)

    assert torch.equal(found["thing"]["weights"], expected()["weights"])
    assert found["thing"]["lr"] == 0.125


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("golden", RUNS)
def test_a_golden_checkpoint_with_any_byte_changed_is_not_restored_when_all_is_verified(tmp_path, golden, name):
    run, directory = copied(tmp_path, golden)
    path = directory / name
    intact = path.read_bytes()
    for at in range(0, len(intact), max(1, len(intact) // 12)):
        changed = bytearray(intact)
        changed[at] ^= 0x10
        path.write_bytes(changed)
        with pytest.raises(NoIntactCheckpoint):
            checkpoint.restore(fresh(), run=str(run), verify="full")
    path.write_bytes(intact)
    assert checkpoint.restore(fresh(), run=str(run), verify="full") is not None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("golden", RUNS)
def test_a_golden_checkpoint_with_a_file_missing_is_not_restored(tmp_path, golden, name):
    run, directory = copied(tmp_path, golden)
    (directory / name).unlink()

    with pytest.raises(NoIntactCheckpoint):
        checkpoint.restore(fresh(), checkpoint=str(directory), run=str(run))


def test_golden_checkpoints_are_small():
    storage, _ = resolve(str(GOLDEN))
    sizes = [sum(storage.sizes(str(next(path.iterdir()))).values()) for path in GOLDEN.iterdir()]
    assert max(sizes) < 128 << 10
