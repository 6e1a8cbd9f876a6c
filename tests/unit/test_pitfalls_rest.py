"""Hazards of Ray, of storage and of models, a sentence a test; others are where the thing itself is tested."""

import ast
import inspect
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

import ray_stateful
from ray_stateful import Checkpointer, Progress, checkpoint, ray_train
from ray_stateful.format.layout import parse_name
from ray_stateful.preemption import PreemptionWatch
from ray_stateful.storage.writer import distribute
from ray_stateful.testing import processes

ROOT = Path(ray_stateful.__file__).parent


def names_used(*roots):
    """Every attribute and name in the Python files below `roots`, by default the package, with where it is."""
    for path in sorted(path for root in roots or [ROOT] for path in root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                yield node.attr, path.name
            elif isinstance(node, ast.Name):
                yield node.id, path.name
            elif isinstance(node, ast.alias):
                yield node.name.rpartition(".")[2], path.name


def test_a_checkpoint_is_never_downloaded_whole():
    downloads = {"as_directory", "to_directory", "copy_files", "TemporaryDirectory"}
    used = {(name, path) for name, path in names_used() if name in downloads}
    # The runner of ranks for tests has a directory to meet in; a helper for tests saves into one.
    assert {path for _, path in used} <= {"processes.py", "resuming.py"}


def test_no_process_is_forked_from_one_with_threads():
    # Unless a context is named, multiprocessing forks here.
    starts = {"fork", "forkpty", "set_start_method", "ProcessPoolExecutor", "Pool", "Process", "get_context"}
    found = {name for name in names_used() if name[0] in starts}
    # Those of Ray Train, and those of the context that is checked here.
    known = {("get_context", path) for path in ("ray_data.py", "ray_train.py", "processes.py")}
    assert found == known | {("Process", "processes.py")}
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(processes))) if isinstance(node, ast.Call)]
    contexts = [ast.unparse(call) for call in calls if ast.unparse(call.func).endswith("get_context")]
    assert contexts == ["multiprocessing.get_context('forkserver')"]


def test_nothing_ends_every_ray_on_the_machine():
    project = [path for path in ROOT.parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
    assert [found for found in names_used(*project) if found[0] == "AutoscalingCluster"] == []


def test_nothing_of_ours_moves_an_object():
    assert [found for found in names_used() if found[0] == "move"] == []


def item(key, rows):
    chunk = ChunkStorageMetadata(torch.Size((0,)), torch.Size((rows,)))
    data = TensorWriteData(chunk=chunk, properties=TensorProperties(torch.uint8), size=torch.Size((rows,)))
    return WriteItem(index=MetadataIndex(key, (0,)), type=WriteItemType.SHARD, tensor_data=data)


def test_a_share_that_no_single_object_could_hold_goes_to_several_files():
    gib = 1 << 30
    # Each as large as may be: two of them are one too many.
    for num_gib, num_items in ((10, 30), (49, 5)):
        items = [item(f"t{n}", num_gib * gib) for n in range(num_items)]

        files = distribute(items, 2, max_file_bytes=97 * gib)

        assert sorted(one.index.fqn for file in files for one in file) == sorted(one.index.fqn for one in items)
        assert max(sum(one.tensor_data.chunk.sizes[0] for one in file) for file in files) <= 97 * gib


def test_in_a_file_values_come_first_and_small_tensors_lie_together_whatever_the_order_of_the_plan():
    values = [WriteItem(MetadataIndex(f"v{n}"), WriteItemType.BYTE_IO) for n in range(3)]
    items = [*values, *(item(f"t{n}", rows) for n, rows in enumerate([9000, 4, 8000, 4, 9000, 4]))]

    (file,) = distribute(items, 1, None)

    assert [one.index.fqn for one in file] == ["v0", "v1", "v2", "t1", "t3", "t5", "t0", "t2", "t4"]
    assert distribute(items, 3, None) == distribute(items[::-1], 3, None)


class Ema:
    """As people write it: an averaged copy of a model, with the state dict of the copy."""

    def __init__(self, model):
        self.averaged = torch.optim.swa_utils.AveragedModel(model)

    def state_dict(self):
        return self.averaged.state_dict()

    def load_state_dict(self, state_dict):
        self.averaged.load_state_dict(state_dict)


def test_a_grad_scaler_an_ema_and_progress_are_saved_under_their_names(tmp_path):
    model = nn.Linear(3, 2)
    ema, scaler, progress = Ema(model), torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3), Progress()
    ema.averaged.update_parameters(nn.Linear(3, 2))
    scaler.load_state_dict({**scaler.state_dict(), "scale": 64.0, "_growth_tracker": 2})
    progress.count(samples=32, tokens=640)
    progress.on_step(step=4)
    checkpoint.save({"ema": ema, "scaler": scaler, "progress": progress}, step=4, run=str(tmp_path))
    fresh = {
        "ema": Ema(nn.Linear(3, 2)),
        "scaler": torch.amp.GradScaler("cpu", init_scale=2.0),
        "progress": Progress(),
    }

    report = checkpoint.restore(fresh, run=str(tmp_path))

    for key, value in ema.state_dict().items():
        assert torch.equal(fresh["ema"].state_dict()[key], value)
    assert fresh["scaler"].state_dict() == scaler.state_dict()
    assert (fresh["progress"].step, fresh["progress"].tokens) == (4, 640)
    assert [part.name for part in report.parts] == ["ema", "progress", "scaler"]


def steps_saved(tmp_path):
    return sorted(parse_name(path.parent.name).step for path in tmp_path.glob("checkpoint_*/manifest.json"))


def test_a_save_is_due_when_its_seconds_have_passed_and_not_before(tmp_path):
    for every_s, expected in ((0.0, [1, 2, 3]), (3600.0, [])):
        run = tmp_path / str(every_s)
        saver = Checkpointer({"progress": Progress()}, every_s=every_s, at_end=False, run=str(run))
        for _ in range(3):
            saver.step()
        assert steps_saved(run) == expected


# A minute is left. What the last save took is what tells whether that is enough.
@pytest.mark.parametrize(("last_save_s", "expected"), [(30.0, [1, 2]), (50.0, [1])])
def test_a_preemption_leads_to_one_save_and_to_none_that_could_not_be_finished(
    tmp_path, monkeypatch, caplog, last_save_s, expected
):
    # Ray's word of a drained node, which tests/ray/test_preemption.py gets from a real one.
    coming = ray_train.Preemption(time.time() + 60.0, (0,))
    monkeypatch.setattr(ray_train, "preemption", lambda *, may_wait: coming)
    saver = Checkpointer({"progress": Progress()}, at_end=False, run=str(tmp_path))
    saver.step_count = 1
    saver.save()
    saver._preemptions, saver._save_s = PreemptionWatch(), last_save_s
    for _ in range(29):
        saver.step()
    assert steps_saved(tmp_path) == expected
    assert caplog.text.count("so none is begun") == (expected == [1])


# A minute is left, and one and a half times what the last save took is wanted for each of the two.
@pytest.mark.parametrize(("last_save_s", "expected"), [(15.0, [1, 2]), (30.0, [1])])
def test_before_a_preemption_a_save_is_made_at_once_if_there_is_time_for_the_one_in_flight_as_well(
    tmp_path, monkeypatch, caplog, last_save_s, expected
):
    coming = None
    monkeypatch.setattr(ray_train, "preemption", lambda *, may_wait: coming)
    saver = Checkpointer({"progress": Progress()}, at_end=False, background=True, run=str(tmp_path))
    saver._save_s = last_save_s
    saver.request_save()
    saver.step()
    coming = ray_train.Preemption(time.time() + 60.0, (0,))
    report = saver.step()

    # Not in the background: the process may be gone before that is done.
    assert (report is not None and report.step == 2) == (2 in expected)
    saver.wait()
    assert steps_saved(tmp_path) == expected
    assert ("so none is begun" in caplog.text) == (expected == [1])


@pytest.mark.parametrize("is_told", [True, False], ids=["told by Ray", "another version of Ray"])
def test_a_preemption_is_looked_for_at_every_step_and_rays_barrier_asked_at_every_tenth(tmp_path, monkeypatch, is_told):
    import ray.train
    from ray.train.v2._internal.execution import context

    asked = []

    class Told:
        preemption_context = property(lambda self: asked.append("told") or type("None_", (), {"preemption_info": None}))

    class Untold:
        """As a Ray without the preemption context has it."""

    # What a worker of Ray Train would find; tests/ray/test_preemption.py asks a real one.
    monkeypatch.setattr(context, "get_train_context", Told if is_told else Untold)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: asked.append("barrier"), raising=False)
    saver = Checkpointer({"progress": Progress()}, at_end=False, run=str(tmp_path))
    for _ in range(20):
        saver.step()

    assert asked == ["told"] * 20 if is_told else ["barrier"] * 2
