"""Muon over `DTensor` parameters: the update of each whole matrix is orthogonalised once, on one rank.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the update M of a matrix, its momentum,
by the nearest matrix with orthonormal rows or columns: U V^T of M = U S V^T, which a few Newton-Schulz iterations
approximate. That is a function of the whole matrix: orthogonalising each rank's shard would be a different optimizer at
every tensor-parallel size. Here each rank updates its part of the momentum; then the parts of each matrix are gathered
on one rank (`whole_matrices.py`) and orthogonalised there, once per step whatever the number of ranks.

`torch.optim.Muon` does the same for whole matrices on one rank (`tests/distributed/test_muon.py` compares the two); its
iteration is not a public function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colonnade.optim.whole_matrices import WholeMatrices
from colonnade.parallel.mesh import ParallelLayout

# The attribute through which a gradient scaler tells an optimizer to skip a step.
FOUND_INF = "found_inf"
# Jordan et al.: a quintic whose slope at zero is steep, so that five iterations bring all singular values near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7


def newton_schulz(matrix: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """`matrix` [rows, columns] with its singular values brought near 1 (between about 0.7 and 1.2).

    Args:
        dtype: dtype of the iterations and of the result.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    is_tall = matrix.shape[0] > matrix.shape[1]
    if is_tall:  # so that the Gram matrix is that of the shorter side
        x = x.T
    # The Frobenius norm is at least the largest singular value, which must be at most 1.
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def newton_schulz_flops(shape: Sequence[int]) -> int:
    """Floating-point operations of `newton_schulz` for a matrix of this shape."""
    shorter, longer = sorted(shape)
    # Each iteration multiplies [m, n] by [n, m], [m, m] by [m, m], and that by [m, n].
    return ITERATIONS * 2 * shorter * shorter * (2 * longer + shorter)


def matched_rate(learning_rate: float, shape: Sequence[int]) -> float:
    """The rate that gives an orthogonal update of this shape the root mean square of an AdamW update, about 0.2.

    From "Muon is Scalable for LLM Training" (arXiv:2502.16982, equation 4): matrices and other parameters can then
    use the same learning rate and weight decay.
    """
    return learning_rate * 0.2 * math.sqrt(max(shape))


def next_momentum(buffer: Tensor, gradient: Tensor, momentum: float) -> Tensor:
    """B of `Muon` after a step. Elementwise, like the two below: the same bits on any part of a matrix."""
    return buffer.lerp(gradient, 1 - momentum)


def nesterov_update(gradient: Tensor, moved: Tensor, momentum: float) -> Tensor:
    """M of `Muon`, from the momentum that has moved already."""
    return gradient.lerp(moved, momentum)


def decayed_step(weight: Tensor, direction: Tensor, decay: float, rate: float) -> Tensor:
    """W of `Muon` after a decay by the factor 1 - `decay` and a step of `rate` against `direction`."""
    return (weight * (1 - decay)).add_(direction, alpha=-rate)


class Muon(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for the other parameters, as one optimizer.

    Its `param_groups` and its state are those of both: `momentum_buffer` for matrices, AdamW's state for the others.
    With B the momentum buffer (an exponential moving average of the gradients G), in Nesterov's form:

        B <- momentum * B + (1 - momentum) * G
        M <- momentum * B + (1 - momentum) * G
        W <- (1 - rate * decay) * W - rate * 0.2 * sqrt(max(rows, columns)) * newton_schulz(M)

    Args:
        matrices: two-dimensional `DTensor`s, each sharded evenly over the tensor-parallel ranks or replicated on them;
            data-parallel ranks may shard them further.
        adamw: the AdamW optimizer of the other parameters.
        lr, momentum, weight_decay: for the matrices.
        layout: the ranks that hold the matrices.
        dtype: dtype of the Newton-Schulz iterations.

    Raises:
        ValueError: a parameter is not a matrix, or is sharded unevenly.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        adamw: torch.optim.AdamW,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        layout: ParallelLayout,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        own: dict[str, Any] = {"params": list(matrices), "momentum": momentum, "lr": lr, "weight_decay": weight_decay}
        super().__init__([own], {"fused": adamw.defaults["fused"]})
        own = self.param_groups[0]
        del own["fused"]  # selects AdamW's implementation; has no meaning for the matrices
        self.adamw = adamw
        self.param_groups.extend(adamw.param_groups)
        adamw.state = self.state
        self._matrices = own
        self._whole, self._dtype = WholeMatrices(layout), dtype
        for parameter in own["params"]:
            self._whole.check(parameter)

    def allocate_momentum(self) -> None:
        """Give each matrix a momentum buffer of zeros, as the first step would."""
        for parameter in self._matrices["params"]:
            self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient. Collective over all ranks.

        If `found_inf` (0 or 1 on the parameters' device, the same on all ranks) is set to 1, parameters and state stay
        unchanged, to the bit.
        """
        assert closure is None
        skipped = getattr(self, FOUND_INF, None)
        if skipped is not None:
            setattr(self.adamw, FOUND_INF, skipped)
        self.adamw.step()
        if skipped is not None:
            delattr(self.adamw, FOUND_INF)
        self._step_matrices(skipped)

    def _step_matrices(self, skipped: Tensor | None) -> None:
        group = self._matrices
        rate, momentum = group["lr"], group["momentum"]
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        orthogonalised = partial(newton_schulz, dtype=self._dtype)
        for batch in self._whole.rounds(parameters):
            updates = []
            for number, parameter in enumerate(batch):
                gradient, state = _local(parameter.grad), self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
                buffer = _local(state["momentum_buffer"])
                moved = next_momentum(buffer, gradient, momentum)
                if self._whole.is_ours(number):
                    updates.append(nesterov_update(gradient, moved, momentum))
                buffer.copy_(_chosen(skipped, buffer, moved))
            directions = self._whole.computed(batch, updates, orthogonalised, self._dtype)
            for parameter, direction in zip(batch, directions, strict=True):
                weight = _local(parameter)
                moved = decayed_step(
                    weight, direction, rate * group["weight_decay"], matched_rate(rate, parameter.shape)
                )
                weight.copy_(_chosen(skipped, weight, moved))


def _chosen(skipped: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    """`old` if the step is skipped, else `new`; decided on the device."""
    return new if skipped is None else torch.where(skipped > 0, old, new)


def _local(tensor: Tensor | None) -> Tensor:
    """This rank's part of a `DTensor`, sharing its memory."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
