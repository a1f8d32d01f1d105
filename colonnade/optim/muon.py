"""Muon over `DTensor` parameters: the update of each whole matrix, orthogonalised once, on one rank.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces the update M of a matrix, its momentum,
by the nearest matrix with orthonormal rows or columns: U V^T of M = U S V^T, which a few Newton-Schulz iterations come
close to. That is a function of the whole matrix, so orthogonalising the shards of ranks would be another optimizer at
every tensor-parallel size. Here shards of the momentum's update are brought together, and the ranks share out the
matrices:

1. Each rank updates its shard of the momentum.
2. Matrices are dealt in rounds of one a rank. An all-to-all over the tensor-parallel group gives each rank the whole of
   its own, from the shards of that group; data-parallel ranks, which hold the same shards, take different matrices.
3. Each rank orthogonalises its matrix, from the same bits and in the same shape whoever it is.
4. A second all-to-all gives each rank its part of the results of its group, and a broadcast those of the other
   data-parallel ranks.

So each matrix is orthogonalised once a step whatever the number of ranks, and a rank holds one whole matrix at a time
beside its parts of a round's results.
`torch.optim.Muon` does the same for whole matrices on one rank (`tests/distributed/test_muon.py` compares); its own
iteration is no public function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

# The attribute through which a gradient scaler tells an optimizer to skip a step.
FOUND_INF = "found_inf"
# Jordan et al.: a quintic whose slope at zero is steep, so that five iterations bring all singular values near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
SMALLEST_NORM = 1e-7


def newton_schulz(matrix: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The matrix with its singular values brought near 1 (between about 0.7 and 1.2). [rows, columns]

    Args:
        dtype: of the iterations and of the result.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype)
    is_tall = matrix.shape[0] > matrix.shape[1]
    if is_tall:  # the Gram matrix is that of the shorter side
        x = x.T
    # The Frobenius norm is at least the largest singular value, which must be at most 1.
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def matched_rate(learning_rate: float, shape: Sequence[int]) -> float:
    """The rate at which an orthogonal update of this shape has the root mean square of AdamW's, about 0.2.

    "Muon is Scalable for LLM Training" (arXiv:2502.16982, equation 4): one learning rate and weight decay for both.
    """
    return learning_rate * 0.2 * math.sqrt(max(shape))


class Muon(torch.optim.Optimizer):
    """Muon for hidden matrices and AdamW for the other parameters, as one optimizer.

    Its `param_groups` are those of both, and so is its state: `momentum_buffer` of a matrix, AdamW's of the others.
    With B the momentum (an exponential mean of gradients G), in Nesterov's form:

        B <- momentum * B + (1 - momentum) * G
        M <- momentum * B + (1 - momentum) * G
        W <- (1 - rate * decay) * W - rate * 0.2 * sqrt(max(rows, columns)) * newton_schulz(M)

    Args:
        matrices: two-dimensional `DTensor`s on one mesh of a single dimension, each cut evenly or whole on every rank.
        adamw: over the other parameters.
        lr, momentum, weight_decay: of the matrices.
        tp_group: the ranks of that mesh.
        dp_group: the ranks that hold the same shards.
        dtype: of the iterations.

    Raises:
        ValueError: a parameter is not a matrix, or cut unevenly.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        adamw: torch.optim.AdamW,
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        tp_group: dist.ProcessGroup,
        dp_group: dist.ProcessGroup,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        own: dict[str, Any] = {"params": list(matrices), "momentum": momentum, "lr": lr, "weight_decay": weight_decay}
        super().__init__([own], {"fused": adamw.defaults["fused"]})
        own = self.param_groups[0]
        del own["fused"]  # which of AdamW's updates is meant; it says nothing of these
        self.adamw = adamw
        self.param_groups.extend(adamw.param_groups)
        adamw.state = self.state
        self._matrices = own
        self._dealer = _Dealer(tp_group, dp_group, dtype)
        for parameter in own["params"]:
            self._dealer.check(parameter)

    def allocate_momentum(self) -> None:
        """Give each matrix its momentum, zeros, as the first step would."""
        for parameter in self._matrices["params"]:
            self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter, requires_grad=False)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient. Collective over both groups.

        Told of an infinity (`found_inf`, 0 or 1 on the parameters' device, the same on all ranks) it leaves parameters
        and state as they are, to the bit.
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
        for batch in self._dealer.rounds(parameters):
            updates = []
            for number, parameter in enumerate(batch):
                gradient, state = _local(parameter.grad), self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)
                buffer = _local(state["momentum_buffer"])
                moved = buffer.lerp(gradient, 1 - momentum)
                if self._dealer.is_ours(number):
                    updates.append(gradient.lerp(moved, momentum))
                buffer.copy_(_chosen(skipped, buffer, moved))
            for parameter, direction in zip(batch, self._dealer.orthogonalised(batch, updates), strict=True):
                weight = _local(parameter)
                moved = weight * (1 - rate * group["weight_decay"])
                moved.add_(direction, alpha=-matched_rate(rate, parameter.shape))
                weight.copy_(_chosen(skipped, weight, moved))


def _chosen(skipped: Tensor | None, old: Tensor, new: Tensor) -> Tensor:
    """`old` where the step is skipped, decided on the device."""
    return new if skipped is None else torch.where(skipped > 0, old, new)


def _local(tensor: Tensor | None) -> Tensor:
    """This rank's part, which shares memory with the whole."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()


@dataclass(frozen=True)
class _Part:
    """What a rank holds of a matrix: its shard, or all of it.

    Attributes:
        dim: the dimension it is cut along; None where it is whole on every rank.
        shape: of this rank's part, as of every other's.
    """

    dim: int | None
    shape: torch.Size

    @property
    def numel(self) -> int:
        return self.shape.numel()


class _Dealer:
    """Deals matrices to ranks, and brings each together on its own."""

    def __init__(self, tp_group: dist.ProcessGroup, dp_group: dist.ProcessGroup, dtype: torch.dtype) -> None:
        self._tp_group, self._dp_group, self._dtype = tp_group, dp_group, dtype
        self._tp, self._tp_rank = dist.get_world_size(tp_group), dist.get_rank(tp_group)
        self._dp, self._dp_rank = dist.get_world_size(dp_group), dist.get_rank(dp_group)

    def check(self, parameter: Tensor) -> None:
        """Raises ValueError where a parameter cannot be dealt."""
        if not isinstance(parameter, DTensor) or parameter.ndim != 2 or parameter.device_mesh.ndim != 1:
            raise ValueError(f"Muon takes matrices that are DTensors on one mesh dimension, not {type(parameter)}")
        placement = parameter.placements[0]
        if isinstance(placement, Shard) and parameter.shape[placement.dim] % self._tp:
            raise ValueError(f"a matrix of shape {tuple(parameter.shape)} cannot be cut evenly over {self._tp} ranks")

    def rounds(self, parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """The parameters in rounds of at most one a rank; of like size, so that no rank waits for a larger one."""
        ordered = sorted(parameters, key=lambda parameter: (-parameter.numel(), tuple(parameter.shape)))
        size = self._tp * self._dp
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def is_ours(self, number: int) -> bool:
        """Whether this tensor-parallel group has matrix `number` of a round; else another data-parallel rank's does."""
        return number // self._tp == self._dp_rank

    def orthogonalised(self, parameters: Sequence[nn.Parameter], updates: Sequence[Tensor]) -> list[Tensor]:
        """The whole matrices of a round, orthogonalised: this rank's part of each. Collective.

        Args:
            parameters: at most one a rank; number i goes to rank i mod tp of data-parallel rank i // tp.
            updates: this rank's part of each matrix that is its group's.
        """
        parts = [_part_of(parameter) for parameter in parameters]
        device = parameters[0].device
        results = [torch.empty(part.shape, dtype=self._dtype, device=device) for part in parts]
        begin = self._dp_rank * self._tp
        ours = slice(begin, begin + self._tp)
        if parts[ours]:
            whole = self._gathered(parts[ours], updates)
            direction = None if whole is None else newton_schulz(whole, self._dtype)
            for result, found in zip(results[ours], self._scattered(parts[ours], direction, device), strict=True):
                result.copy_(found)
        if self._dp > 1:
            pending = [
                dist.broadcast(result, group=self._dp_group, group_src=number // self._tp, async_op=True)
                for number, result in enumerate(results)
            ]
            for work in pending:
                work.wait()
        return results

    def _gathered(self, parts: Sequence[_Part], updates: Sequence[Tensor]) -> Tensor | None:
        """The whole of this tensor-parallel rank's matrix, from the parts of all; None where it has none."""
        own = parts[self._tp_rank] if self._tp_rank < len(parts) else None
        if self._tp == 1:
            return updates[0]
        # Of a matrix that every rank holds whole its rank needs none from the others.
        sent = [part.numel if part.dim is not None or rank == self._tp_rank else 0 for rank, part in enumerate(parts)]
        received = [0] * self._tp
        if own is not None:
            received = [own.numel if own.dim is not None or rank == self._tp_rank else 0 for rank in range(self._tp)]
        pieces = [update.reshape(-1) for update, count in zip(updates, sent, strict=True) if count]
        flat = torch.cat(pieces) if pieces else updates[0].new_empty(0)
        arrived = flat.new_empty(sum(received))
        dist.all_to_all_single(arrived, flat, received, self._padded(sent), group=self._tp_group)
        if own is None:
            return None
        shards = [piece.view(own.shape) for piece in arrived.split([count for count in received if count])]
        return torch.cat(shards, own.dim) if own.dim is not None else shards[0]

    def _scattered(self, parts: Sequence[_Part], direction: Tensor | None, device: torch.device) -> list[Tensor]:
        """This rank's part of each matrix, from the ranks that hold the whole of them."""
        if self._tp == 1:
            assert direction is not None
            return [direction]
        sent = [0] * self._tp
        flat = torch.empty(0, dtype=self._dtype, device=device)
        if direction is not None:
            own = parts[self._tp_rank]
            pieces = [direction] * self._tp if own.dim is None else direction.chunk(self._tp, own.dim)
            sent = [own.numel] * self._tp
            flat = torch.cat([piece.reshape(-1) for piece in pieces])
        received = self._padded([part.numel for part in parts])
        arrived = flat.new_empty(sum(received))
        dist.all_to_all_single(arrived, flat, received, sent, group=self._tp_group)
        pieces = arrived.split(received)
        return [piece.view(part.shape) for piece, part in zip(pieces[: len(parts)], parts, strict=True)]

    def _padded(self, counts: Sequence[int]) -> list[int]:
        """One count a rank: none for the ranks that a last round leaves out."""
        return [*counts, *([0] * (self._tp - len(counts)))]


def _part_of(parameter: nn.Parameter) -> _Part:
    assert isinstance(parameter, DTensor)
    placement = parameter.placements[0]
    return _Part(placement.dim if isinstance(placement, Shard) else None, parameter.to_local().shape)
