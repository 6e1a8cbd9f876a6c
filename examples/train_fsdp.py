"""Train a byte-level transformer with FSDP2 under Ray Train; stop it, lose workers, go on with any number of them.

    python examples/train_fsdp.py --name bytes --num-workers 2 --steps 200
    python examples/train_fsdp.py --name bytes --num-workers 3 --steps 400            # goes on after step 200
    python examples/train_fsdp.py --name bytes --num-workers 2:8 --storage-path s3://bucket/runs

It trains on the sources of Python's standard library: nothing is downloaded. A run that has checkpoints under
`<storage path>/<name>` goes on from the newest intact one; give another name to begin anew.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
import torch.distributed as dist
from history import Journal
from model import Shape, build_model, sample_losses
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from text import ByteSamples, read_standard_library

from ray_stateful import Checkpointer, GlobalBatchSampler, ModelState, OptimizerState, RandomState, ResizeGuard

# Options that say how Ray runs the training function, and are none of its own.
FOR_RAY = ("num_workers", "gpu", "max_failures", "resize_after", "num_to_keep", "no_guard")

# Not `print`: a Ray worker shows it twice.
logger = logging.getLogger("train_fsdp")


def train_func(config: dict[str, Any]) -> None:
    device = ray.train.torch.get_device()
    shape = Shape(dim=config["dim"], num_layers=config["num_layers"], seq_len=config["seq_len"])
    dataset = ByteSamples(read_standard_library(config["text_bytes"]), shape.seq_len)
    model = build_model(shape, seed=config["seed"], device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    # Constant after the warm-up: a schedule that ends would tie the run to the number of steps it began with.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))

    batches = GlobalBatchSampler(
        len(dataset),
        global_batch_size=config["global_batch_size"],
        micro_batch_size=config["micro_batch_size"],
        seed=config["seed"],
    )
    state = {
        "model": ModelState(model),
        "optimizer": OptimizerState(model, optimizer, scheduler),
        "batches": batches,
        "random": RandomState(),
    }
    journal = Journal(Path(config["history"])) if config["history"] else None
    with Checkpointer(state, every_n_steps=config["save_every"], run=config["run"]) as checkpointer:
        report = checkpointer.restore()
        if journal:
            journal.began(checkpointer.step_count, str(report) if report else None)
        while checkpointer.step_count < config["steps"]:
            for batch in batches:  # to the end of the epoch; from where the run was resumed, at first
                began_s = time.monotonic()
                trained: list[int] = []
                total = torch.zeros((), dtype=torch.float64, device=device)
                for micro in batch:
                    losses = sample_losses(model, dataset[micro.indices].to(device))
                    (losses.sum() * micro.loss_scale).backward()
                    if not micro.is_padding:
                        total += losses.detach().double().sum()
                        trained += micro.indices
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

                # The mean over the global batch, in double precision: it is compared between numbers of workers.
                if dist.is_initialized():
                    dist.all_reduce(total)
                loss = total.item() / batch.num_samples
                if journal:
                    # Before it may be saved: a checkpoint holds no step that the notes lack.
                    journal.trained(checkpointer.step_count + 1, loss, trained)
                checkpointer.step({"loss": loss})
                step = checkpointer.step_count
                if step % config["print_every"] == 0 and (not dist.is_initialized() or dist.get_rank() == 0):
                    logger.info("step %6d  loss %.4f", step, loss)
                if step == config["steps"]:
                    break
                # For the demos: what is done to a run takes Ray seconds, and a fast machine would be done before.
                time.sleep(max(0.0, began_s + config["pace"] - time.monotonic()))


def num_workers(text: str) -> int | tuple[int, int]:
    """`4` is four workers, `2:8` whatever fits from two to eight."""
    smallest, _, largest = text.partition(":")
    return (int(smallest), int(largest)) if largest else int(smallest)


def run_of(storage_path: str, name: str) -> str:
    """Where Ray Train would put the run: below the path of the storage, before its query."""
    path, mark, query = storage_path.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{query}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    run = parser.add_argument_group("the run")
    run.add_argument("--name", default="bytes", help="a run of this name is gone on with (default: %(default)s)")
    run.add_argument("--storage-path", help="directory or URI, s3://... for one (default: ~/ray_results)")
    run.add_argument("--num-workers", type=num_workers, default=2, help="N, or MIN:MAX for as many as fit; 0: no Ray")
    run.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    run.add_argument("--steps", type=int, default=200, help="optimizer steps, over all resumes (default: %(default)s)")
    run.add_argument("--save-every", type=int, default=20, metavar="STEPS", help="default: %(default)s")
    run.add_argument("--num-to-keep", type=int, help="checkpoints that Ray keeps, the newest (default: all)")
    run.add_argument("--max-failures", type=int, default=3, help="restarts within this command (default: %(default)s)")
    run.add_argument(
        "--resize-after", type=float, default=60.0, metavar="SECONDS", help="look for more machines so often"
    )
    run.add_argument("--no-guard", action="store_true", help="do not save before Ray changes the number of workers")
    run.add_argument(
        "--pace", type=float, default=0.0, metavar="SECONDS", help="of a step at the least: for who wants to watch"
    )
    run.add_argument("--history", type=Path, help="a directory for notes on every step, on each worker's machine")
    run.add_argument("--print-every", type=int, default=10, metavar="STEPS", help="default: %(default)s")
    data = parser.add_argument_group("model and data; to be kept when a run is resumed")
    data.add_argument("--global-batch-size", type=int, default=16, help="samples a step (default: %(default)s)")
    data.add_argument("--micro-batch-size", type=int, default=8, help="samples a forward pass (default: %(default)s)")
    data.add_argument("--text-bytes", type=int, default=2**25, help="how much text (default: 32 MiB, most there is)")
    data.add_argument("--seq-len", type=int, default=64, help="bytes a sample (default: %(default)s)")
    data.add_argument("--dim", type=int, default=256, help="width of the model (default: %(default)s)")
    data.add_argument("--num-layers", type=int, default=7, help="its depth (default: %(default)s)")
    data.add_argument("--lr", type=float, default=1e-3, help="learning rate (default: %(default)s)")
    data.add_argument("--seed", type=int, default=17, help="of weights and data order (default: %(default)s)")
    return parser.parse_args(arguments)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse()
    config = dict(vars(options))
    for_ray = {name: config.pop(name) for name in FOR_RAY}
    storage_path = config.pop("storage_path")
    config["history"] = str(options.history.resolve()) if options.history else None
    # In Ray's local mode the workers have no storage to ask for.
    config["run"] = run_of(storage_path, options.name) if storage_path and for_ray["num_workers"] == 0 else None
    TorchTrainer(
        train_func,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=for_ray["num_workers"],
            use_gpu=for_ray["gpu"],
            elastic_resize_monitor_interval_s=for_ray["resize_after"],
        ),
        run_config=RunConfig(
            name=options.name,
            storage_path=storage_path,
            callbacks=[] if for_ray["no_guard"] else [ResizeGuard()],
            checkpoint_config=CheckpointConfig(num_to_keep=for_ray["num_to_keep"]),
            failure_config=FailureConfig(max_failures=for_ray["max_failures"]),
        ),
    ).fit()


if __name__ == "__main__":
    main()
