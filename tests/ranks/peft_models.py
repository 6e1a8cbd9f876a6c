"""Tiny transformers models with adapters of the real `peft`, built in place: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "score": {"task_type": "SEQ_CLS"},
}


def build(kind: str, seed: int) -> nn.Module:
    """A frozen base that is the same for every seed, with adapters that are not."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    base = (LlamaForSequenceClassification if kind == "score" else LlamaForCausalLM)(config)
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=2, **{"target_modules": ["q_proj", "v_proj"], **KINDS[kind]}))


def nudge(model: nn.Module) -> None:
    """Make every trained parameter one that no fresh model has."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand(parameter.shape, generator=generator))
