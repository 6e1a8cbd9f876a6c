"""Coming from Ray's documented recipe: DCP, a temporary directory, one object with model and optimizer in it."""

import json
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from attacks.archives import name_of
from attacks.corpus import Workshop
from attacks.pickles import archive, items_are, text
from attacks.victim import Free
from ray_stateful import ModelState, OptimizerState, Progress, RandomState, restore, save
from ray_stateful.cli.main import main
from ray_stateful.errors import NoIntactCheckpoint
from ray_stateful.testing import run_ranks


class AppState:
    def __init__(self, model, optimizer, epoch=0):
        self.model, self.optimizer, self.epoch = model, optimizer, epoch

    def state_dict(self):
        model, optim = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optim, "epoch": self.epoch}

    def load_state_dict(self, state):
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"])
        self.epoch = state["epoch"]


def build(seed):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(7, 16), torch.nn.GELU(), torch.nn.Linear(16, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def whole(model, optimizer):
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return {key: getattr(value, "full_tensor", value.clone)() for key, value in tensors.items()}


def save_as_the_recipe_does(path):
    model, optimizer = build(seed=1)
    model(torch.randn(8, 7)).pow(2).mean().backward()
    optimizer.step()
    dcp.save({"app": AppState(model, optimizer, epoch=4)}, checkpoint_id=path)
    return whole(model, optimizer)


def go_on_from_it(path, run):
    model, optimizer = build(seed=2)
    app = AppState(model, optimizer)
    restore({"app": app}, checkpoint=path, run=run, timeout_s=60)
    save({"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}, step=1, run=run, timeout_s=60)

    fresh, fresh_optimizer = build(seed=3)
    state = {"model": ModelState(fresh), "optimizer": OptimizerState(fresh, fresh_optimizer)}
    report = restore(state, run=run, timeout_s=60)
    return app.epoch, report.verified, whole(fresh, fresh_optimizer)


def test_a_checkpoint_of_rays_recipe_is_gone_on_from_on_another_number_of_workers_bit_for_bit(tmp_path):
    expected, *_ = run_ranks(2, save_as_the_recipe_does, str(tmp_path / "old"))

    for outcome in run_ranks(3, go_on_from_it, str(tmp_path / "old"), str(tmp_path / "new")):
        epoch, verified, found = outcome
        assert (epoch, verified) == (4, True)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def train_and_save(run):
    progress = Progress()
    for _ in range(3):
        progress.count(samples=8)
    state = {"model": ModelState(build(seed=1)[0]), "progress": progress, "random": RandomState()}
    return save(state, step=3, samples=24, run=run, timeout_s=60).uri


def restore_what_makes_a_mesh(path, run):
    restore({"thing": Free()}, checkpoint=path, run=run, timeout_s=20)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning")
def test_an_item_that_would_make_a_device_mesh_is_refused_on_every_rank(tmp_path):
    # Its constructor is a collective, which the one rank that reads a tensor for all would enter alone.
    path = str(tmp_path / "plain")
    dcp.save({"thing": {"weights": torch.ones(40, 30)}}, checkpoint_id=path)
    ranks = pickle.EMPTY_LIST + pickle.MARK + pickle.BININT1 + b"\0" + pickle.BININT1 + b"\1" + pickle.APPENDS
    call = name_of("torch.distributed.device_mesh", "DeviceMesh") + text("cpu") + ranks + pickle.TUPLE2 + pickle.REDUCE
    padding = pickle.NONE * 5000 + call  # as long as the tensor would be
    items_are(Workshop(tmp_path / "plain"), archive(pickle.PROTO + b"\2" + padding + pickle.STOP), "thing.weights")

    outcomes = run_ranks(3, restore_what_makes_a_mesh, path, str(tmp_path / "run"))

    assert [type(outcome) for outcome in outcomes] == [NoIntactCheckpoint] * 3
    assert "DeviceMesh" in str(outcomes[0])


def go_on_from_an_import(run):
    progress = Progress()
    state = {"model": ModelState(build(seed=2)[0]), "progress": progress, "random": RandomState()}
    report = restore(state, run=run, timeout_s=60)
    return report.step, report.samples, progress.samples


def test_an_imported_checkpoint_of_several_workers_goes_on_on_as_many_from_its_own_step(tmp_path):
    uri = run_ranks(2, train_and_save, str(tmp_path / "first"))[0]

    result = CliRunner().invoke(main, ["import", uri, str(tmp_path / "second"), "--json"])

    made = json.loads(result.stdout)
    assert made["name"].startswith("checkpoint_s0000000003_")
    outcomes = run_ranks(2, go_on_from_an_import, str(tmp_path / "second"))
    assert outcomes == [(3, 24, 24)] * 2
