"""The fused head and cross-entropy against torch's own over whole logits: numbers, gradients, memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.training_step.work import most_above
from colonnade.parallel import head_loss as head_loss_module
from colonnade.parallel.head_loss import IGNORE_INDEX, LossOptions, head_loss, row_block_of

HIDDEN, VOCABULARY = 48, 300
# A multiple of 128 is stored: 4 slices of 128 rows, the third with 44 of the vocabulary, the last with none.
SLICES, WIDTH = 4, 128


def inputs(tokens: int, dtype: torch.dtype, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [M, H], the stored weight [v, H] (padding is not 0 here) and labels [M], some left out."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(SLICES * WIDTH, HIDDEN, generator=generator, dtype=torch.float64) * spread / HIDDEN**0.5
    labels = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    labels[5::7] = IGNORE_INDEX
    return hidden.to(dtype), weight.to(dtype), labels


def fused(
    hidden: Tensor, weight: Tensor, labels: Tensor, slices: int = SLICES, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients of hidden states and weight; the weight's in its own dtype, products in that of `hidden`."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    weights = weight.chunk(slices)
    starts = [index * len(weights[0]) for index in range(slices)]
    products = [part.detach().to(hidden.dtype) for part in weights]
    loss = head_loss(
        [hidden] * slices, weights, products, labels, starts, LossOptions(VOCABULARY, **options), group=None
    )
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def by_torch(
    hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float = 0.0, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by autograd of `F.cross_entropy`, and of the formula of the z-loss, over whole logits."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = hidden @ weight[:VOCABULARY].T
    loss = F.cross_entropy(logits, labels, reduction="sum")
    if z_loss:
        loss = loss + z_loss * (logits.logsumexp(1) ** 2)[labels != IGNORE_INDEX].sum()
    loss = loss * scale
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"scale": 1 / 77},
    "z-loss": {"z_loss": 0.3},
    "z-loss, scaled": {"z_loss": 1e-2, "scale": 5.0},
}


@pytest.mark.parametrize("slices", [1, SLICES])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("tokens", [33, 700])
def test_equals_cross_entropy_in_float64(tokens: int, name: str, slices: int) -> None:
    """33 tokens are two stretches, the second of one token; 700 are ten."""
    case = inputs(tokens, torch.float64)
    found, expected = fused(*case, slices=slices, **OPTIONS[name]), by_torch(*case, **OPTIONS[name])
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-11, atol=1e-12)
    assert found[1][labels_left_out(case[2])].count_nonzero() == 0
    assert found[2][VOCABULARY:].count_nonzero() == 0


def labels_left_out(labels: Tensor) -> Tensor:
    left_out = labels == IGNORE_INDEX
    assert left_out.any()
    return left_out


def test_no_label_counts() -> None:
    hidden, weight, labels = inputs(40, torch.float64)
    for value in fused(hidden, weight, torch.full_like(labels, IGNORE_INDEX), z_loss=0.1):
        assert not value.any()


@pytest.mark.parametrize("label", [VOCABULARY, -1, -101])
def test_a_label_outside_of_the_vocabulary_is_refused_as_by_cross_entropy(label: int) -> None:
    hidden, weight, labels = inputs(40, torch.float64)
    labels[7] = label
    with pytest.raises(IndexError, match=f"Target {label} is out of bounds"):
        by_torch(hidden, weight, labels)
    with pytest.raises(ValueError, match=f"label {label} is not in the vocabulary of {VOCABULARY}"):
        fused(hidden, weight, labels)


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


def test_in_float32() -> None:
    case = inputs(700, torch.float32)
    exact = by_torch(case[0].double(), case[1].double(), case[2], z_loss=1e-2)
    for value, reference in zip(fused(*case, z_loss=1e-2), exact, strict=True):
        assert relative_error(value, reference) < 1e-6


@pytest.mark.parametrize("spread", [1.0, 4.0], ids=["near uniform", "peaked"])
def test_in_bfloat16_beside_cross_entropy_over_bfloat16_logits(spread: float) -> None:
    """Exact: float64 over the same rounded inputs. Parameters are float32, products bf16, as in a run."""
    hidden, weight, labels = inputs(700, torch.bfloat16, spread)
    exact = by_torch(hidden.double(), weight.double(), labels)
    theirs = by_torch(hidden, weight, labels)
    ours = fused(hidden, weight.float(), labels)
    assert relative_error(ours[0], exact[0]) <= 1e-3
    for own, other, reference in zip(ours, theirs, exact, strict=True):
        assert relative_error(own, reference) <= max(1.25 * relative_error(other, reference), 4e-3)


def test_confident_targets_in_bfloat16_are_at_least_as_exact_as_cross_entropy() -> None:
    """Where p is near 1, p - 1 is a difference of near numbers: rounded to bf16 first, nothing would be left of it."""
    noise, weight, _ = inputs(700, torch.bfloat16)
    labels = torch.arange(700) % VOCABULARY
    hidden = (weight[labels] * torch.linspace(8, 16, 700).unsqueeze(1) + 0.3 * noise).to(torch.bfloat16)
    exact = by_torch(hidden.double(), weight.double(), labels)
    logits = hidden.double() @ weight[:VOCABULARY].double().T
    assert float((F.softmax(logits, 1).gather(1, labels.unsqueeze(1)) > 0.9).double().mean()) > 0.7
    theirs, ours = by_torch(hidden, weight, labels), fused(hidden, weight.float(), labels)
    for own, other, reference in zip(ours, theirs, exact, strict=True):
        assert relative_error(own, reference) <= relative_error(other, reference)


@pytest.mark.parametrize(
    ("dtype", "tokens", "vocabulary"), [(torch.float32, 2048, 32_000), (torch.bfloat16, 1024, 8192)]
)
def test_extra_memory_is_an_eighth_of_the_logits(dtype: torch.dtype, tokens: int, vocabulary: int) -> None:
    """What forward and backward pass allocate above what goes in and the gradients that come out."""
    hidden = torch.randn(tokens, 64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, 64).requires_grad_()
    product = weight.detach().to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,))
    options = LossOptions(vocabulary)
    most = most_above(
        lambda: head_loss([hidden], [weight], [product], labels, [0], options, None).backward(), torch.device("cpu")
    )
    gradients = hidden.nbytes + weight.nbytes
    assert most >= gradients, "the gradients were allocated under the profiler"
    assert most - gradients <= tokens * vocabulary * 4 / 8


class Products(TorchDispatchMode):
    """Writes down where the rows of each factor and result of a matrix product begin, in elements."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.out, torch.ops.aten.mm.default, torch.ops.aten.addmm_.default):
            for matrix in (*args, *(kwargs or {}).values()):
                if isinstance(matrix, Tensor) and matrix.dtype == torch.bfloat16:
                    self.rows += [int(matrix.storage_offset()), max(matrix.stride())]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_cpu", [True, False])
def test_rows_of_products_begin_on_16_bytes(monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    """As fast kernels need them, although the vocabulary is odd and row blocks depend on the number of tokens."""
    row_block = partial(row_block_of, on_cpu=on_cpu)
    monkeypatch.setattr(head_loss_module, "row_block_of", lambda *sizes, on_cpu: row_block(*sizes))
    tokens, vocabulary = 4096, 5001
    hidden = torch.randn(tokens, 32).bfloat16().requires_grad_()
    weight = torch.randn(5120, 32, requires_grad=True)
    labels = torch.randint(0, vocabulary, (tokens,))
    with Products() as products:
        head_loss([hidden], [weight], [weight.detach().bfloat16()], labels, [0], LossOptions(vocabulary), None)
    assert len(products.rows) > 6 * 3 * 2
    assert {number % 8 for number in products.rows} == {0}
    blocks = {row_block(chunk, 5120, 32) for chunk in range(8, 1000)}
    assert {rows % 128 for rows in blocks} == {0}
    assert len(blocks) == 1 if on_cpu else len(blocks) > 10


def test_float16_does_not_overflow_where_many_entries_share_a_direction() -> None:
    """Rows that all point one way: their sum over the vocabulary is beyond float16, their mean is not."""
    generator = torch.Generator().manual_seed(5)
    weight = (8 + torch.randn(SLICES * WIDTH * 40, HIDDEN, generator=generator)).to(torch.float16)
    hidden = (1e-3 * torch.randn(64, HIDDEN, generator=generator)).to(torch.float16)
    labels = torch.randint(0, len(weight), (64,), generator=generator)
    assert not torch.isfinite(weight.sum(0, dtype=torch.float32).to(torch.float16)).any()
    options = LossOptions(len(weight))
    hidden.requires_grad_()
    loss = head_loss([hidden], [weight.float().requires_grad_()], [weight], labels, [0], options, group=None)
    loss.backward()
    assert hidden.grad is not None
    exact = hidden.detach().double().requires_grad_()
    F.cross_entropy(exact @ weight.double().T, labels, reduction="sum").backward()
    assert exact.grad is not None
    assert relative_error(hidden.grad, exact.grad) < 2e-2
