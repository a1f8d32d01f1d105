"""Floating-point operations of training and the peaks they are compared with (model FLOPs utilization, MFU)."""

from __future__ import annotations

import re

from colonnade.run_settings import PRECISION_ALIASES

# Dense peaks in TFLOP/s per device as torch names it, from the vendors' data sheets (figures there marked "with
# sparsity" are halved). "fp32" is arithmetic outside the matrix units, "tf32" what fp32 products use when
# torch.set_float32_matmul_precision allows it. Consumer cards: with accumulation in fp32, as in training.
# The first matching pattern counts, so variants come before the plain name.
_PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"\bB200\b", {"bf16": 2250.0, "fp16": 2250.0, "tf32": 1125.0, "fp32": 75.0, "fp8": 4500.0}),
    (r"\bH200 NVL\b", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0, "fp8": 1670.5}),
    (r"\bG?H200\b", {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9, "fp8": 1978.9}),
    (r"\bH100 PCIe\b", {"bf16": 756.0, "fp16": 756.0, "tf32": 378.0, "fp32": 51.0, "fp8": 1513.0}),
    (r"\bH100 NVL\b", {"bf16": 835.5, "fp16": 835.5, "tf32": 417.5, "fp32": 60.0, "fp8": 1670.5}),
    (r"\bH100\b", {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9, "fp8": 1978.9}),
    (r"\bA100\b", {"bf16": 312.0, "fp16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    (r"\bA40\b", {"bf16": 149.7, "fp16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    (r"\bA10\b", {"bf16": 125.0, "fp16": 125.0, "tf32": 62.5, "fp32": 31.2}),
    (r"\bL40S\b", {"bf16": 362.05, "fp16": 362.05, "tf32": 183.0, "fp32": 91.6, "fp8": 733.0}),
    (r"\bL4\b", {"bf16": 121.0, "fp16": 121.0, "tf32": 60.0, "fp32": 30.3, "fp8": 242.5}),
    (r"\bRTX 4090\b(?! D| Laptop)", {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6, "fp8": 330.3}),
    (r"\bRTX 3090\b(?! Ti)", {"bf16": 71.0, "fp16": 71.0, "tf32": 35.6, "fp32": 35.6}),
    (r"\bV100-SXM[23]\b", {"fp16": 125.0, "fp32": 15.7}),
    (r"\bT4\b", {"fp16": 65.0, "fp32": 8.1}),
    (r"\bMI3(00X|25X)\b", {"bf16": 1307.4, "fp16": 1307.4, "tf32": 653.7, "fp32": 163.4, "fp8": 2614.9}),
)

# GiB that a program can use: what torch reports as total memory, as its out-of-memory errors quote it ("has a total
# capacity of 139.80 GiB" on an H200). The driver keeps 1 to 2% of HBM for itself, and error correction takes up to 8%
# of GDDR6. If a name covers several sizes, the smallest is listed.
# Those marked * are the GB of the data sheet, because no such quotation is known: slightly too much.
_MEMORY_GIB: tuple[tuple[str, float], ...] = (
    (r"\bB200\b", 180),  # *
    (r"\bGH200 144G", 144),  # *
    (r"\bGH200\b", 96),  # *
    (r"\bH200\b", 139.8),
    (r"\bH100 NVL\b", 93),
    (r"\bH100\b", 79.1),
    (r"\bA100\b.*\b80 ?GB\b", 79.15),
    (r"\bA100\b", 39.5),
    (r"\bA40\b", 48),  # *
    (r"\bA10\b", 22),
    (r"\bL40S\b", 44.4),
    (r"\bL4\b", 22),
    (r"\bRTX 4090\b(?! D| Laptop)", 23.5),
    (r"\bRTX 3090\b(?! Ti)", 24),  # *
    (r"\bV100-SXM[23]\b.*\b32GB\b", 31.7),
    (r"\bV100-SXM[23]\b", 16),  # *
    (r"\bT4\b", 14.7),
    (r"\bMI300X\b", 192),  # *
    (r"\bMI325X\b", 256),  # *
)

_FLOAT8_OF_ROWS = r"\b(G?H[12]00|B200)\b"  # Ada has float8, but no kernels with row-wise scales (torch 2.13)


def training_flops_per_token(
    num_parameters_without_embeddings: int,
    num_layers: int,
    hidden_attention_width: int,
    block_size: int,
    vocab_size: int,
    hidden_size: int,
) -> int:
    """FLOPs per token of one training step (forward and backward), the numerator of MFU.

    ``6 x (N + H x V) + 12 x L x A x T`` (PaLM, arXiv:2204.02311, appendix B; nanoGPT's ``estimate_mfu``):
    each weight takes part in one multiply and one add in the forward pass and twice that in the backward pass; each
    layer's ``Q K^T`` and ``P V`` take ``2 A T`` each forward, twice that backward. Attention counts **in full**, not
    halved for the causal mask: the convention of PaLM, nanoGPT and most published MFU figures. Operations recomputed by
    activation checkpointing do not count (that would be hardware utilization), nor do norms, RoPE and softmax.
    The input embedding is a lookup and costs nothing; the output head is a product of H x V whether tied or not.

    Args:
        num_parameters_without_embeddings: N, parameters of the whole model (all tensor-parallel ranks) without input
            embedding and output head. Norm weights may be included: they change the result by less than 1e-3.
        num_layers: L.
        hidden_attention_width: A = num_attention_heads x head_dim (not the KV heads).
        block_size: T, tokens per sequence.
        vocab_size: V, without padding.
        hidden_size: H.
    """
    matmul_parameters = num_parameters_without_embeddings + hidden_size * vocab_size
    return 6 * matmul_parameters + 12 * num_layers * hidden_attention_width * block_size


def peak_flops(device_name: str, dtype_name: str) -> float | None:
    """Dense peak of one device in FLOP/s, None if unknown (a CPU, an unlisted card, a MIG partition).

    Args:
        device_name: as ``torch.cuda.get_device_name`` gives it.
        dtype_name: ``fp32``, ``tf32``, ``bf16``, ``fp16`` or ``fp8``, or torch's name for one of fp32, bf16 and fp16.
            Pass ``tf32`` for fp32 training with TF32 products allowed.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    dtype = PRECISION_ALIASES.get(dtype_name.removeprefix("torch."), dtype_name)
    for pattern, tflops in _PEAK_TFLOPS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return tflops[dtype] * 1e12 if dtype in tflops else None
    return None


def has_float8_of_rows(device_name: str) -> bool:
    """Whether a device has float8 products with row-wise scales; an unknown device is assumed to be newer, so True."""
    return device_memory(device_name) is None or re.search(_FLOAT8_OF_ROWS, device_name, re.IGNORECASE) is not None


def device_memory(device_name: str) -> int | None:
    """Usable memory of one device in bytes, None if unknown. `device_name` as in `peak_flops`."""
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, size in _MEMORY_GIB:
        if re.search(pattern, device_name, re.IGNORECASE):
            return int(size * 2**30)
    return None
