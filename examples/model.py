"""A small decoder-only transformer over bytes, with tied embeddings, sharded by FSDP2.

Nothing here knows of checkpoints: it is the plain PyTorch that a run brings along.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 - the name everyone knows it by
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

NUM_BYTES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a model. The defaults have 5.6 million parameters."""

    dim: int = 256
    num_layers: int = 7
    num_heads: int = 4
    seq_len: int = 64


class Block(nn.Module):
    """Attention and a feed-forward layer, each on a normalised copy of the stream it adds to."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.attention_norm = nn.LayerNorm(shape.dim)
        self.qkv = nn.Linear(shape.dim, 3 * shape.dim, bias=False)
        self.attention_out = nn.Linear(shape.dim, shape.dim, bias=False)
        self.ffn_norm = nn.LayerNorm(shape.dim)
        self.ffn_in = nn.Linear(shape.dim, 4 * shape.dim, bias=False)
        self.ffn_out = nn.Linear(4 * shape.dim, shape.dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        hidden: torch.Tensor = F.gelu(self.ffn_in(self.ffn_norm(x)))
        return x + self.ffn_out(hidden)


class ByteTransformer(nn.Module):
    """Logits of the next byte, of shape (num_samples, seq_len, 256), from bytes of shape (num_samples, seq_len)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, shape.dim)
        self.position = nn.Embedding(shape.seq_len, shape.dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_layers))
        self.norm = nn.LayerNorm(shape.dim)
        self.lm_head = nn.Linear(shape.dim, NUM_BYTES, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What adds to the stream starts small, or its variance grows with every layer.
                smaller = (2 * shape.num_layers) ** -0.5 if name.endswith("_out.weight") else 1.0
                nn.init.normal_(parameter, std=0.02 * smaller)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.lm_head(self.norm(x))
        return logits


def build_model(shape: Shape, *, seed: int, device: torch.device) -> ByteTransformer:
    """The model on `device`, sharded over all workers; the same weights for any number of them."""
    # Drawn on the CPU and whole on each worker: a draw per shard would depend on how many shards there are.
    torch.manual_seed(seed)
    model = ByteTransformer(shape).to(device)
    if dist.is_initialized():
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def sample_losses(model: nn.Module, samples: torch.Tensor) -> torch.Tensor:
    """Each sample's mean loss over its bytes, of shape (num_samples,)."""
    logits = model(samples[:, :-1])
    per_byte = F.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten(), reduction="none")
    return per_byte.view(len(samples), -1).mean(dim=1)
