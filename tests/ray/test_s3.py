"""The whole job against a real S3 server: TorchTrainer, FSDP2, resumed on another number of workers."""

import hashlib
import os
import signal
import sys

import ray
import torch
from ray import cloudpickle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn

from ray_stateful.storage.uris import resolve


def train(config):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from ray_stateful import Checkpointer, GlobalBatchSampler, ModelState, OptimizerState, RandomState

    torch.manual_seed(config["seed"])
    inputs = torch.linspace(-1, 1, 1280).reshape(320, 4)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batches = GlobalBatchSampler(len(inputs), global_batch_size=16, micro_batch_size=4, seed=3)
    state = {
        "model": ModelState(model),
        "optimizer": OptimizerState(model, optimizer),
        "batches": batches,
        "random": RandomState(),
    }

    def digest():
        whole = [parameter.full_tensor() for parameter in model.parameters()]
        moments = [value for entry in optimizer.state.values() for value in entry.values()]
        whole += [moment.full_tensor() if hasattr(moment, "full_tensor") else moment for moment in moments]
        data = b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in whole)
        return hashlib.sha256(data).hexdigest()

    with Checkpointer(state, every_n_steps=5, background=config["background"], timeout_s=60) as checkpointer:
        report = checkpointer.restore()
        restored = digest() if report is not None else None
        if report is not None and checkpointer.step_count >= config["until"]:
            return {"restored": restored, "report": str(report)}
        for batch in batches:
            for micro in batch:
                loss = model(inputs[micro.indices]).square().sum() * micro.loss_scale
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            checkpointer.step({"loss": loss.item()})
            if checkpointer.step_count == config["die_at"] and report is None:
                checkpointer.wait()
                # One worker is lost, without a word, as a machine is.
                if dist.get_rank() == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            if checkpointer.step_count == config["until"]:
                break
    return {"trained": digest(), "report": None if report is None else str(report), "step": checkpointer.step_count}


def test_a_job_on_s3_loses_a_worker_and_goes_on_and_is_resumed_on_another_number_of_workers(cluster, s3_environment):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    server, bucket = s3_environment, s3_environment.make_bucket("runs")
    uri = f"s3://test:test@{bucket}/runs?endpoint_override=127.0.0.1:{server.port}&scheme=http&region=us-east-1"

    def fit(num_workers, **config):
        return TorchTrainer(
            train,
            train_loop_config={"die_at": 8, "until": 12, **config},
            scaling_config=ScalingConfig(num_workers=num_workers),
            run_config=RunConfig(name="job", storage_path=uri, failure_config=FailureConfig(max_failures=1)),
        ).fit()

    trained = fit(2, seed=1, background=True).return_value
    # It died after step 8, and went on from the checkpoint of step 5.
    assert "(step 5; written by 2 workers)" in trained["report"]
    assert trained["step"] == 12

    resumed = fit(3, seed=2, background=False)

    assert resumed.return_value["restored"] == trained["trained"]
    assert "(step 12; written by 2 workers, now 3)" in resumed.return_value["report"]
    storage, path = resolve(uri)
    assert len([name for name in storage.directories(f"{path}/job") if name.startswith("checkpoint_s")]) == 3
    assert ray.is_initialized()
