"""FLOPs a token against torch's own counter on the reference model of transformers, and the table of peaks."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from colonnade.tuning.flops import peak_flops, training_flops_per_token


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("key_value_heads", "head_dim"), [(4, 16), (2, 24)])
def test_flops_match_the_counter_of_torch(tied: bool, key_value_heads: int, head_dim: int) -> None:
    # Eager attention: plain products over the whole square, so in full. (The counter knows no fused attention of the
    # CPU, and counts the scores that a fused backward computes again.)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        vocab_size=257,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert isinstance(model, LlamaForCausalLM)
    batch, block = 2, 32
    tokens = torch.randint(257, (batch, block))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    weights = [parameter for name, parameter in model.model.layers.named_parameters() if parameter.dim() == 2]
    flops = training_flops_per_token(
        sum(weight.numel() for weight in weights), 3, 4 * head_dim, block, config.vocab_size, 64
    )
    counted = counter.get_total_flops()
    assert flops * batch * block == counted

    with_norms = sum(parameter.numel() for parameter in model.model.parameters()) - 257 * 64
    assert training_flops_per_token(with_norms, 3, 4 * head_dim, block, 257, 64) * batch * block == pytest.approx(
        counted, rel=0.01
    )


@pytest.mark.parametrize(
    ("device", "dtype", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp32", 19.5),
        ("NVIDIA A10", "bf16", 125),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "tf32", 494.7),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H200", "torch.bfloat16", 989.4),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250),
        ("NVIDIA L40S", "fp16", 362.05),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("AMD Instinct MI300X", "bf16", 1307.4),
    ],
)
def test_known_peaks(device: str, dtype: str, tflops: float) -> None:
    assert peak_flops(device, dtype) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", "fp32"),
        ("AMD EPYC 9654", "bf16"),
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("NVIDIA A100-SXM4-80GB", "fp8"),
        ("NVIDIA H200", "int8"),
    ],
)
def test_unknown_peaks_are_none(device: str, dtype: str) -> None:
    assert peak_flops(device, dtype) is None


def test_consistency_of_the_table_with_the_data_sheets() -> None:
    """On every card with matrix units for it, fp8 is twice bf16 and bf16 twice tf32, as the hardware is built."""
    for device in ("NVIDIA B200", "NVIDIA H200", "NVIDIA H100 PCIe", "NVIDIA L4", "NVIDIA L40S", "AMD Instinct MI300X"):
        tf32, bf16, fp8 = (peak_flops(device, dtype) for dtype in ("tf32", "bf16", "fp8"))
        assert tf32 is not None
        assert bf16 is not None
        assert fp8 is not None
        assert bf16 / tf32 == pytest.approx(2, rel=0.03)
        assert fp8 / bf16 == pytest.approx(2, rel=0.03)
