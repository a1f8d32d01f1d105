"""Matrix products of the projections in float8, through torchao, with one scale per row (arXiv:2209.05433).

Each row of a product's left factor, and each column of its right factor, is scaled to the range of float8 by its own
largest value, recomputed for every product. A column-parallel projection has whole rows on each rank, so its rounding
does not depend on the number of ranks; the rows of a row-parallel projection are sharded, and each part has its own
scale. Weights are stored and gradients summed as without float8. Embedding, head and attention stay in the activations'
dtype.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from colonnade.errors import UsageError
from colonnade.model_config import ModelConfig
from colonnade.setting_values import multiples_near

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]

FIRST_CAPABILITY = (9, 0)  # Hopper: the first whose kernels take one scale per row
MULTIPLE = 16  # the kernels require sizes that are multiples of this


def require_bf16_beside_float8(precision: str) -> None:
    if precision != "bf16":
        raise UsageError(f"--float8 and --precision {precision}: its kernels give bf16; use --precision bf16")


def require_float8(precision: str, device: torch.device) -> None:
    """Raises UsageError if --float8 cannot work: no torchao, or a GPU that is too old or a precision other than bf16.

    On the CPU the products are emulated, in any precision.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UsageError("--float8 needs the package torchao: pip install 'colonnade[float8]', or leave it out")
    if device.type == "cpu":
        return
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < FIRST_CAPABILITY:
        raise UsageError(
            f"--float8 needs an NVIDIA GPU of compute capability {'.'.join(map(str, FIRST_CAPABILITY))} or more, and "
            f"this is {torch.cuda.get_device_name(device)}: leave it out"
        )
    require_bf16_beside_float8(precision)


def _sizes(config: ModelConfig, slices: int) -> dict[str, int]:
    """The sizes of one slice's matrix products."""
    heads, shared = config.num_attention_heads // slices, max(1, config.num_key_value_heads // slices)
    return {
        "the hidden size": config.hidden_size,
        "the width of the heads": config.head_dim * heads,
        "the width of queries, keys and values": config.head_dim * (heads + 2 * shared),
        "the feed-forward": config.intermediate_size // slices,
    }


def check_float8_sizes(config: ModelConfig, block_size: int, slices: int, *, fixed_slices: bool) -> None:
    """Raises UsageError if a size, cut into `slices`, is not a multiple of what the kernels require.

    The gradient of a weight is a product over tokens, so their number has to be a multiple too.

    Args:
        fixed_slices: whether the number of slices is independent of the number of ranks (`--tensor-slices`).
    """
    if block_size % MULTIPLE:
        near = [size for size in multiples_near(block_size, MULTIPLE) if size <= config.max_position_embeddings]
        advice = f"use {' or '.join(map(str, near))}, or" if near else "use another model, or"
        raise UsageError(f"--float8: --block-size {block_size} is no multiple of {MULTIPLE}; {advice} leave it out")
    for name, size in _sizes(config, slices).items():
        if size % MULTIPLE:
            # Fewer slices only help if the uncut sizes fit.
            smaller = all(value % MULTIPLE == 0 for value in _sizes(config, 1).values())
            flag = "--tensor-slices" if fixed_slices else "--tensor-parallel-size"
            advice = f"another model, a smaller {flag}" if smaller else "another model"
            raise UsageError(
                f"--float8: with {slices} slice{'s' if slices > 1 else ''} {name} is {size}, no multiple of "
                f"{MULTIPLE}; use {advice}, or leave it out"
            )


def float8_linear(device: torch.device) -> Linear:
    """A projection whose three products, forward and backward, run in float8. On the CPU they are emulated."""
    from torchao.float8.config import Float8LinearConfig
    from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args

    recipe = Float8LinearConfig.from_recipe_name("rowwise")
    if device.type == "cpu":
        object.__setattr__(recipe, "emulate", True)
    # The settings of the three products; only the module's constructor creates them.
    products = Float8Linear(MULTIPLE, MULTIPLE, bias=False, device="meta", config=recipe).linear_mm_config

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = matmul_with_hp_or_float8_args.apply(x, weight.to(x.dtype).t(), products, recipe)
        return y if bias is None else y + bias.to(x.dtype)

    return linear
