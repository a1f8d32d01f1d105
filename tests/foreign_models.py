"""Models of `transformers` with random small sizes, saved as users would have them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# For each family, its model_type and its particular config values.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases-tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3-scaling": ("llama", {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_SCALING}}),
    "linear-scaling": ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}}),
    "yarn-scaling": (
        "llama",
        {
            "rope_parameters": {
                "rope_theta": 1e4,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 64}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "ernie4_5": ("ernie4_5", {}),
    "ernie4_5-biases": ("ernie4_5", {"use_bias": True, "tie_word_embeddings": False}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
}


def foreign_model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model of the family with sizes drawn from the seed; all parameters are random, norms and biases included."""
    model_type, particular = FAMILIES[family]
    draw = random.Random(f"{family}/{seed}")
    key_value_heads = draw.choice([1, 2, 4])
    heads = 4 * draw.choice([1, 2])
    head_dim = 2 * draw.randint(4, 9)
    config = CONFIG_MAPPING[model_type](
        **{
            "vocab_size": draw.randint(150, 400),
            "hidden_size": heads * head_dim,
            "intermediate_size": 8 * draw.randint(9, 20),
            "num_hidden_layers": draw.choice([2, 3]),
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 64,
            "rms_norm_eps": draw.choice([1e-5, 1e-6]),
            "pad_token_id": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **particular,
            **changes,
        }
    )
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name else 0.0
            parameter.normal_(centre, 0.1, generator=generator)
    return model.eval()


def save_foreign_model(folder: Path, family: str, max_shard_size: str = "1GB", **changes: Any) -> Any:
    """Build a `foreign_model`, write it to a folder with `save_pretrained`, and return it."""
    model = foreign_model(family, **changes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
