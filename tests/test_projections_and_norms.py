"""What a segment is made of, against torch's own functions in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from colonnade.decoder.column_parallel import column_parallel_linear
from colonnade.decoder.elementwise import IN_CACHE, rms_norm, swiglu

# Of the largest entry: a few units of the last place.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def results(function: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """The value, and the gradient of each input."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    value = function(*inputs)
    value.backward(gradient.to(value.dtype))
    return [value.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def assert_equal_to(reference: Callable[..., Tensor], ours: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    gradient = torch.randn_like(ours(*inputs)) + 0.5
    expected = results(reference, [tensor.double() for tensor in inputs], gradient)
    found = results(ours, inputs, gradient)
    assert len(found) == len(inputs) + 1
    for one, other, like in zip(found, expected, [gradient, *inputs], strict=True):
        assert one.dtype == like.dtype
        assert one.shape == like.shape
        assert (one.double() - other).abs().max() <= TOLERANCES[inputs[0].dtype] * other.abs().max()


@dtypes
@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("stored_in_half", [False, True], ids=["float32_weight", "own_weight"])
def test_rms_norm_equals_torch(dtype: torch.dtype, transposed: bool, stored_in_half: bool) -> None:
    """Of more rows than are normed at a time, the last of them fewer, and with a mean that is not zero."""
    torch.manual_seed(0)
    channels = 256
    rows = 2 * IN_CACHE // channels + 86
    x = (torch.randn(2, rows // 2, channels) * torch.rand(2, rows // 2, 1) + 0.3).to(dtype)
    x[0, 0] = 0
    weight = torch.randn(channels).to(dtype if stored_in_half else torch.promote_types(dtype, torch.float32))
    if transposed:
        x = x.transpose(0, 1)
    assert_equal_to(
        lambda x, weight: F.rms_norm(x, (channels,), weight, 1e-5),
        lambda x, weight: rms_norm(x, weight, eps=1e-5),
        (x, weight),
    )


@dtypes
def test_swiglu_equals_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    def reference(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    assert_equal_to(reference, swiglu, (torch.randn(3, 5, 44).to(dtype),))


@dtypes
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_column_parallel_linear_equals_torch(dtype: torch.dtype, biased: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 5, 24), torch.randn(40, 24), torch.randn(40)][: 3 if biased else 2]

    def ours(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return column_parallel_linear(x, weight, bias)

    assert_equal_to(F.linear, ours, [tensor.to(dtype) for tensor in inputs])


def test_column_parallel_linear_of_a_weight_used_twice_and_of_one_that_does_not_learn() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)

    def twice(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight: linear(linear(x, weight, None).square(), weight, None)

    assert_equal_to(twice(F.linear), twice(column_parallel_linear), (x, weight))
    assert_equal_to(lambda x: F.linear(x, weight), lambda x: column_parallel_linear(x, weight, None), (x,))
