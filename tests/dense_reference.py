"""The decoder written out on full tensors, without any of the project's code: the reference for sharded runs.

`tests/test_model.py` compares it with `transformers` in float32; the distributed tests also use it in float64, in
which `transformers` cannot be used because it keeps parts of its arithmetic in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference, divided by the norm of the expected value."""
    return float((actual - expected).detach().norm() / expected.detach().norm())


def assert_gradients_equal(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor | None], limit: float = 1e-5
) -> None:
    """Assert that each full gradient is within a relative error of `limit`, and 0 in the vocabulary's padding rows."""
    assert actual.keys() == expected.keys()
    for name, gradient in actual.items():
        reference = expected[name]
        assert reference is not None, name
        rows = len(reference)
        assert relative_error(gradient[:rows], reference) <= limit, name
        assert not gradient[rows:].any(), f"{name}: padding has a gradient"


def dense_loss(weights: Mapping[str, Tensor], config: Mapping[str, float], ids: Tensor, labels: Tensor) -> Tensor:
    """Sum of token losses of a decoder, given its full weights under Hugging Face's names."""
    return F.cross_entropy(dense_logits(weights, config, ids).flatten(0, 1), labels.flatten(), reduction="sum")


def dense_logits(weights: Mapping[str, Tensor], config: Mapping[str, float], ids: Tensor) -> Tensor:
    """[B, T] ids -> [B, T, vocab] logits."""
    x = weights["model.embed_tokens.weight"][ids]
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("model.layers."))
    for index in range(layers):
        w = {
            k[len(f"model.layers.{index}.") :]: v for k, v in weights.items() if k.startswith(f"model.layers.{index}.")
        }
        x = x + _attention(_norm(x, w["input_layernorm.weight"], config["rms_norm_eps"]), w, config)
        x = x + _mlp(_norm(x, w["post_attention_layernorm.weight"], config["rms_norm_eps"]), w)
    x = _norm(x, weights["model.norm.weight"], config["rms_norm_eps"])
    return x @ weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).T


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def _linear(x: Tensor, w: Mapping[str, Tensor], name: str) -> Tensor:
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def _mlp(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    gate = _linear(x, w, "mlp.gate_proj")
    return _linear(gate * torch.sigmoid(gate) * _linear(x, w, "mlp.up_proj"), w, "mlp.down_proj")


def _attention(x: Tensor, w: Mapping[str, Tensor], config: Mapping[str, float]) -> Tensor:
    batch, block, _ = x.shape
    head = int(config["head_dim"])

    def heads(name: str) -> Tensor:
        return _linear(x, w, f"self_attn.{name}").view(batch, block, -1, head).transpose(1, 2)

    query, key, value = _rope(heads("q_proj"), config), _rope(heads("k_proj"), config), heads("v_proj")
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) / math.sqrt(head)
    future = torch.ones(block, block, dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ value
    return _linear(mixed.transpose(1, 2).reshape(batch, block, -1), w, "self_attn.o_proj")


def _rope(x: Tensor, config: Mapping[str, float]) -> Tensor:
    block, head = x.shape[-2:]
    # The rotary table is always computed in float32, as is usual, whatever dtype the rest is computed in.
    frequency = 1.0 / config["rope_theta"] ** (torch.arange(0, head, 2).float() / head)
    angle = torch.arange(block).float()[:, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., : head // 2], x[..., head // 2 :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
