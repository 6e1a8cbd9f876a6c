"""Fine-tune a small language model with LoRA under Ray Train, on any number of workers; export the adapter for PEFT.

    python examples/finetune_lora.py --name lora --num-workers 2 --steps 40
    python examples/finetune_lora.py --name lora --num-workers 3 --steps 80 --adapter adapter    # goes on after step 40

The base model is made in place, from a seed, where yours would be loaded with `from_pretrained`: nothing is
downloaded. A checkpoint holds what is trained, the adapter, its optimizer and where the run stands; the base is not in
it, so it has to be the same when the run is resumed. With --adapter, what was trained is written at the end as PEFT
wants it, loaded by PEFT onto a fresh base, and tried on text that it has not seen.
"""

from __future__ import annotations

import argparse
import logging
import posixpath
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray.train.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the name everyone knows it by
from peft import LoraConfig, PeftModel, get_peft_model
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from text import ByteSamples, read_standard_library
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from train_fsdp import num_workers, run_of
from transformers import LlamaConfig, LlamaForCausalLM

from ray_stateful import Checkpointer, GlobalBatchSampler, ModelState, OptimizerState, RandomState, ResizeGuard

SEED = 17
SEQ_LEN = 64
NUM_TRAINED, NUM_HELD_OUT = 512, 64  # samples

LORA = LoraConfig(
    task_type="CAUSAL_LM",
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    # Trained whole, and part of the adapter: the base is not trained at all, so its head is of no use yet.
    modules_to_save=["lm_head"],
)

logger = logging.getLogger("finetune_lora")


def build_base() -> LlamaForCausalLM:
    """The base model, over bytes; the same weights on each worker and in each process."""
    torch.manual_seed(SEED)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=SEQ_LEN,
            tie_word_embeddings=False,
        )
    )


def build_model() -> PeftModel:
    """The base with a new adapter, sharded over all workers."""
    # Both are drawn whole on each worker, from one seed: shards of one model, whatever their number.
    model = get_peft_model(build_base(), LORA)
    if dist.is_initialized():
        mesh = init_device_mesh(ray.train.torch.get_device().type, (dist.get_world_size(),))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def samples() -> tuple[ByteSamples, ByteSamples]:
    """Samples to train on, and samples of what follows them in the text."""
    text = read_standard_library((NUM_TRAINED + NUM_HELD_OUT) * SEQ_LEN + 1)
    cut = NUM_TRAINED * SEQ_LEN
    return ByteSamples(text[: cut + 1], SEQ_LEN), ByteSamples(text[cut:], SEQ_LEN)


def sample_losses(model: nn.Module, of_bytes: torch.Tensor) -> torch.Tensor:
    """Each sample's mean loss over its bytes, of shape (num_samples,)."""
    logits = model(input_ids=of_bytes[:, :-1]).logits
    per_byte = F.cross_entropy(logits.flatten(0, 1), of_bytes[:, 1:].flatten(), reduction="none")
    return per_byte.view(len(of_bytes), -1).mean(dim=1)


def train_func(config: dict[str, Any]) -> None:
    device = ray.train.torch.get_device()
    model = build_model().to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["lr"])
    dataset, _ = samples()
    batches = GlobalBatchSampler(len(dataset), global_batch_size=16, micro_batch_size=8, seed=SEED)
    state = {
        "model": ModelState(model, is_peft=True),  # the adapter alone
        "optimizer": OptimizerState(model, optimizer),
        "batches": batches,
        "random": RandomState(),
    }
    with Checkpointer(state, every_n_steps=config["save_every"]) as checkpointer:
        checkpointer.restore()
        while checkpointer.step_count < config["steps"]:
            for batch in batches:
                total = torch.zeros((), device=device)
                for micro in batch:
                    loss = sample_losses(model, dataset[micro.indices].to(device)).sum() * micro.loss_scale
                    loss.backward()
                    total += loss.detach()
                optimizer.step()
                optimizer.zero_grad()
                checkpointer.step({"loss": total.item()})
                step = checkpointer.step_count
                if step % 10 == 0 and dist.get_rank() == 0:
                    logger.info("step %4d  loss of this worker's samples %.3f", step, total.item())
                if step == config["steps"]:
                    break


def export_adapter(checkpoint: str, directory: Path) -> None:
    """Write the adapter of `checkpoint`, a path or URI, to `directory`, as PEFT's `save_pretrained` would."""
    command = [sys.executable, "-m", "ray_stateful.cli", "export", checkpoint, str(directory)]
    subprocess.run([*command, "--format", "safetensors", "--adapter"], check=True)
    # What the adapter is made of: no tensors, so no part of a checkpoint.
    LORA.save_pretrained(str(directory))


@torch.no_grad()
def held_out_loss(model: nn.Module) -> float:
    _, held_out = samples()
    model.eval()
    return sample_losses(model, held_out[range(len(held_out))]).mean().item()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--name", default="lora", help="a run of this name is gone on with (default: %(default)s)")
    parser.add_argument("--storage-path", default=str(Path("~/ray_results").expanduser()), help="directory or URI")
    parser.add_argument("--num-workers", type=num_workers, default=2, help="N, or MIN:MAX for as many as fit")
    parser.add_argument("--gpu", action="store_true", help="one GPU for each worker")
    parser.add_argument("--steps", type=int, default=40, help="over all resumes (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS", help="default: %(default)s")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--adapter", type=Path, metavar="DIRECTORY", help="write the adapter there, at the end")
    options = parser.parse_args(arguments)
    if options.num_workers == 0:
        parser.error("--num-workers is 0; this needs one worker or more")
    if options.adapter and options.adapter.exists() and any(options.adapter.iterdir()):
        # Said now: the export refuses it too, but that is after the training.
        parser.error(f"--adapter {options.adapter} has files already; name a new directory")
    return options


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse()
    result = TorchTrainer(
        train_func,
        train_loop_config={"steps": options.steps, "save_every": options.save_every, "lr": options.lr},
        scaling_config=ScalingConfig(num_workers=options.num_workers, use_gpu=options.gpu),
        run_config=RunConfig(
            name=options.name,
            storage_path=options.storage_path,
            callbacks=[ResizeGuard()],
            failure_config=FailureConfig(max_failures=3),
        ),
    ).fit()

    if options.adapter is None:
        return
    name = posixpath.basename(result.checkpoint.path)
    export_adapter(run_of(options.storage_path, f"{options.name}/{name}"), options.adapter)
    without = held_out_loss(build_base())
    adapted = held_out_loss(PeftModel.from_pretrained(build_base(), str(options.adapter)))
    print(f"{options.adapter}: adapter of {name}; loss on unseen text {without:.3f} without it, {adapted:.3f} with it")


if __name__ == "__main__":
    main()
