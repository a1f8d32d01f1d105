"""Functions of whole matrices, computed by ranks that hold only parts: each matrix once, on one rank.

A matrix is sharded over the tensor-parallel ranks, by rows or columns, or replicated on them. If data-parallel ranks
shard the parameters, each of them holds some rows of that; otherwise, and across replicas, they hold copies. Matrices
are dealt to the ranks in rounds of one per rank. In a round:

1. An all-to-all over the data-parallel ranks that shard rows gives each tensor-parallel group its own matrices, still
   sharded over the group's ranks.
2. A second all-to-all, within that group, gives each rank one whole matrix.
3. Each rank applies the function, to the same bits in the same shape whichever rank it is.
4. Two more all-to-alls return the results, and a broadcast sends them to the ranks that hold copies.

A rank computes one whole matrix at a time. Before and after, it holds what it has received and what it sends on: up to
four matrices of that size, in the dtype of the parts, and its parts of the results of as many matrices as there are
ranks that hold one copy of the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard

from colonnade.parallel.mesh import ParallelLayout

T = TypeVar("T")


@dataclass(frozen=True)
class _Ranks:
    """A process group and this rank's place in it; without a group the rank is alone."""

    group: dist.ProcessGroup | None
    size: int
    rank: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> _Ranks:
        return cls(None, 1, 0) if group is None else cls(group, dist.get_world_size(group), dist.get_rank(group))


@dataclass(frozen=True)
class MatrixCut:
    """How a matrix is laid out over the ranks.

    Attributes:
        dim: the dimension that is sharded over tensor-parallel ranks; None if each of them holds the whole.
        shape: the shape of a tensor-parallel rank's part.
        shard_rows: rows of that part on each data-parallel rank that shards it; the last ones hold fewer, or none.
    """

    dim: int | None
    shape: tuple[int, int]
    shard_rows: int

    @classmethod
    def of(cls, shape: Sequence[int], dim: int | None, tp: int, shards: int) -> MatrixCut:
        """The cut of a matrix of this shape: along `dim` over `tp` ranks, by rows over `shards` data-parallel ranks."""
        rows, columns = shape
        part = (rows // tp if dim == 0 else rows, columns // tp if dim == 1 else columns)
        return cls(dim, part, -(-part[0] // shards))

    def rows(self, rank: int) -> slice:
        """The rows of a tensor-parallel part that data-parallel rank `rank` holds."""
        return slice(min(self.shape[0], rank * self.shard_rows), min(self.shape[0], (rank + 1) * self.shard_rows))

    def shard_shape(self, rank: int) -> tuple[int, int]:
        rows = self.rows(rank)
        return rows.stop - rows.start, self.shape[1]


def dealt(matrices: Sequence[T], shape: Callable[[T], Sequence[int]], ranks: int) -> list[list[T]]:
    """Matrices in rounds of at most one per rank, of similar size, so that no rank waits for a larger one."""
    ordered = sorted(matrices, key=lambda matrix: (-math.prod(shape(matrix)), tuple(shape(matrix))))
    return [ordered[start : start + ranks] for start in range(0, len(ordered), ranks)]


class WholeMatrices:
    """Deals matrices to ranks, and gathers each matrix on its rank.

    Args:
        layout: the ranks over which the `parameters` of all methods are laid out.
    """

    def __init__(self, layout: ParallelLayout) -> None:
        self._tp = _Ranks.of(layout.tp_group)
        is_shared = layout.shard_mesh is not None
        self._shards = _Ranks.of(layout.replica_mesh.get_group() if is_shared else None)
        self._copies = _Ranks.of(layout.replicate_group if is_shared else layout.dp_group)

    def check(self, parameter: Tensor) -> None:
        """Raises ValueError if a parameter cannot be dealt."""
        if not isinstance(parameter, DTensor) or parameter.ndim != 2:
            raise ValueError(f"only matrices that are DTensors can be dealt, not {type(parameter)}")
        shape, dim = tuple(parameter.shape), _cut_dim(parameter)
        if dim is not None and shape[dim] % self._tp.size:
            raise ValueError(f"a matrix of shape {shape} cannot be cut evenly over {self._tp.size} ranks")
        expected, found = self._cut(parameter).shard_shape(self._shards.rank), tuple(parameter.to_local().shape)
        if found != expected:
            raise ValueError(f"of a matrix of shape {shape} this rank holds {found}, and {expected} by the layout")

    def _cut(self, parameter: Tensor) -> MatrixCut:
        return MatrixCut.of(parameter.shape, _cut_dim(parameter), self._tp.size, self._shards.size)

    def rounds(self, parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
        """The parameters in rounds, as returned by `dealt`."""
        return dealt(parameters, lambda parameter: parameter.shape, self._team * self._copies.size)

    @property
    def _team(self) -> int:
        """Number of ranks that together hold one copy of all parameters."""
        return self._tp.size * self._shards.size

    def is_ours(self, number: int) -> bool:
        """Whether matrix `number` of a round is computed by the ranks of this rank's copy, not by those of another."""
        return number // self._team == self._copies.rank

    def computed(
        self,
        parameters: Sequence[nn.Parameter],
        parts: list[Tensor],
        function: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> Iterator[Tensor]:
        """Yield this rank's part of `function` of each whole matrix of a round. Collective; consume all results.

        Args:
            parameters: at most one per rank, as returned by `rounds`.
            parts: this rank's part of each matrix that `is_ours`; all of one dtype. Emptied by this method.
            function: maps a whole matrix to a matrix of the same shape in `dtype`.
        """
        cuts, device = [self._cut(parameter) for parameter in parameters], parameters[0].device
        copies = [cuts[start : start + self._team] for start in range(0, len(cuts), self._team)]
        results: list[Tensor] = []
        if self._copies.rank < len(copies):
            results = self._computed_here(copies[self._copies.rank], parts, function, dtype)
        for copy, own in enumerate(copies):
            found = results
            if copy != self._copies.rank:
                found = [torch.empty(cut.shard_shape(self._shards.rank), dtype=dtype, device=device) for cut in own]
            if self._copies.size > 1:
                self._tell(found, copy)
            yield from found

    def _tell(self, results: Sequence[Tensor], copy: int) -> None:
        """Broadcast results from the rank with number `copy`, among those that hold copies, to the others."""
        pending = [
            dist.broadcast(result, group=self._copies.group, group_src=copy, async_op=True)
            for result in results
            if result.numel()
        ]
        for work in pending:
            work.wait()

    def _computed_here(
        self,
        cuts: Sequence[MatrixCut],
        parts: list[Tensor],
        function: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """`computed` for the matrices that are dealt to the ranks of this rank's copy."""
        device, size = parts[0].device, self._tp.size
        groups = [cuts[start : start + size] for start in range(0, self._team, size)]
        own = groups[self._shards.rank]
        columns = self._with_all_rows(groups, parts)
        parts.clear()
        back: list[Tensor] = []
        if own:
            whole = self._whole(own, columns)
            columns.clear()
            made = None if whole is None else function(whole).contiguous()
            del whole
            back = self._tensor_parallel_parts(own, made, dtype, device)
        return self._own_rows(groups, back, dtype, device)

    def _with_all_rows(self, groups: Sequence[Sequence[MatrixCut]], parts: Sequence[Tensor]) -> list[Tensor]:
        """The tensor-parallel parts of this group's matrices, from rows that are spread over all groups."""
        shards = self._shards
        if shards.size == 1:
            return list(parts)
        starts = [sum(map(len, groups[:rank])) for rank in range(shards.size)]
        sent = [parts[start : start + len(group)] for start, group in zip(starts, groups, strict=True)]
        received = [[cut.shard_shape(rank) for cut in groups[shards.rank]] for rank in range(shards.size)]
        arrived = _exchanged(sent, received, shards.group, parts[0].dtype, parts[0].device)
        return [torch.cat(rows) for rows in zip(*arrived, strict=True)]

    def _own_rows(
        self, groups: Sequence[Sequence[MatrixCut]], parts: Sequence[Tensor], dtype: torch.dtype, device: torch.device
    ) -> list[Tensor]:
        """This rank's rows of all groups' matrices, from the tensor-parallel parts that each group has of its own."""
        shards = self._shards
        if shards.size == 1:
            return list(parts)
        own = groups[shards.rank]
        sent = [[part[cut.rows(rank)] for part, cut in zip(parts, own, strict=True)] for rank in range(shards.size)]
        received = [[cut.shard_shape(shards.rank) for cut in group] for group in groups]
        return [part for arrived in _exchanged(sent, received, shards.group, dtype, device) for part in arrived]

    def _whole(self, cuts: Sequence[MatrixCut], parts: Sequence[Tensor]) -> Tensor | None:
        """This rank's matrix as a whole, from the parts of its tensor-parallel group; None if it has no matrix."""
        tp = self._tp
        if tp.size == 1:
            return parts[0]
        own = cuts[tp.rank] if tp.rank < len(cuts) else None
        # The rank of a replicated matrix already has all of it, and needs nothing from the others.
        sent = [
            [part] if cut.dim is not None or rank == tp.rank else []
            for rank, (cut, part) in enumerate(zip(cuts, parts, strict=True))
        ]
        received = [
            [own.shape] if own is not None and (own.dim is not None or rank == tp.rank) else []
            for rank in range(tp.size)
        ]
        arrived = _exchanged(_padded(sent, tp.size), received, tp.group, parts[0].dtype, parts[0].device)
        pieces = [piece for from_rank in arrived for piece in from_rank]
        if own is None:
            return None
        return torch.cat(pieces, own.dim) if own.dim is not None else pieces[0]

    def _tensor_parallel_parts(
        self, cuts: Sequence[MatrixCut], whole: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> list[Tensor]:
        """This rank's part of each of its tensor-parallel group's matrices, from the ranks that hold them whole."""
        tp = self._tp
        if tp.size == 1:
            assert whole is not None
            return [whole]
        sent: list[list[Tensor]] = []
        if whole is not None:
            dim = cuts[tp.rank].dim
            sent = [[piece] for piece in ([whole] * tp.size if dim is None else whole.chunk(tp.size, dim))]
        received = [[cut.shape] for cut in cuts]
        arrived = _exchanged(_padded(sent, tp.size), _padded(received, tp.size), tp.group, dtype, device)
        return [piece for from_rank in arrived for piece in from_rank]


def _cut_dim(parameter: Tensor) -> int | None:
    """The dimension that is sharded over tensor-parallel ranks; None if each of them holds the whole."""
    assert isinstance(parameter, DTensor)
    placement = parameter.placements[-1]
    return placement.dim if isinstance(placement, Shard) else None


def _padded(lists: Sequence[list], size: int) -> list[list]:
    """`lists` padded to one per rank, with empty ones for ranks that have no matrix in the last round."""
    return [*lists, *([] for _ in range(size - len(lists)))]


def _exchanged(
    sent: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[tuple[int, int]]],
    group: dist.ProcessGroup | None,
    dtype: torch.dtype,
    device: torch.device,
) -> list[list[Tensor]]:
    """All-to-all: send each rank of the group its tensors, and return those received from each, in rank order.

    Args:
        sent: the tensors for each rank.
        shapes: the shapes of the tensors from each rank.
        dtype: the dtype of all tensors.
    """
    flat = torch.cat([torch.empty(0, dtype=dtype, device=device), *(part.reshape(-1) for to in sent for part in to)])
    sizes = [[math.prod(shape) for shape in from_rank] for from_rank in shapes]
    arrived = flat.new_empty(sum(map(sum, sizes)))
    counts = [sum(part.numel() for part in to) for to in sent]
    dist.all_to_all_single(arrived, flat, list(map(sum, sizes)), counts, group=group)
    pieces = iter(arrived.split([size for from_rank in sizes for size in from_rank]))
    return [[next(pieces).view(shape) for shape in from_rank] for from_rank in shapes]
