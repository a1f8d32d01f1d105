"""What is a function of whole matrices, computed by ranks that hold parts: each matrix once, on one rank.

A matrix is cut over the tensor-parallel ranks, by rows or columns, or whole on each. Where data-parallel ranks share
out the parameters, each of them holds some of the rows of that; else, and in replicas, copies. Matrices are dealt
in rounds of one a rank. In a round:

1. An all-to-all over the ranks that share rows out gives each tensor-parallel group its own matrices, as its ranks cut
   them.
2. A second one within that group gives each rank the whole of one.
3. Each rank computes, from the same bits and in the same shape whoever it is.
4. Two more take the results back, and a broadcast tells the ranks that hold copies.

A rank computes one whole matrix at a time. On the way to it and back it holds what it has been sent and sends on: up to
four matrices as large, in the dtype of the parts, and its parts of the results of as many matrices as hold one copy of
the parameters.
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
    """A group with this rank's place in it; without a group it is alone."""

    group: dist.ProcessGroup | None
    size: int
    rank: int

    @classmethod
    def of(cls, group: dist.ProcessGroup | None) -> _Ranks:
        return cls(None, 1, 0) if group is None else cls(group, dist.get_world_size(group), dist.get_rank(group))


@dataclass(frozen=True)
class MatrixCut:
    """How a matrix lies on the ranks.

    Attributes:
        dim: what tensor-parallel ranks cut; None where each holds all.
        shape: of a tensor-parallel rank's part.
        shard_rows: rows of that which each rank that shares them out holds; the last ones hold fewer, or none.
    """

    dim: int | None
    shape: tuple[int, int]
    shard_rows: int

    @classmethod
    def of(cls, shape: Sequence[int], dim: int | None, tp: int, shards: int) -> MatrixCut:
        """That of a matrix of this shape, cut along `dim`, over so many ranks of both kinds."""
        rows, columns = shape
        part = (rows // tp if dim == 0 else rows, columns // tp if dim == 1 else columns)
        return cls(dim, part, -(-part[0] // shards))

    def rows(self, rank: int) -> slice:
        """What a rank holds of a tensor-parallel part."""
        return slice(min(self.shape[0], rank * self.shard_rows), min(self.shape[0], (rank + 1) * self.shard_rows))

    def shard_shape(self, rank: int) -> tuple[int, int]:
        rows = self.rows(rank)
        return rows.stop - rows.start, self.shape[1]


def dealt(matrices: Sequence[T], shape: Callable[[T], Sequence[int]], ranks: int) -> list[list[T]]:
    """Matrices in rounds of at most one a rank; of like size, so that no rank waits for a larger one."""
    ordered = sorted(matrices, key=lambda matrix: (-math.prod(shape(matrix)), tuple(shape(matrix))))
    return [ordered[start : start + ranks] for start in range(0, len(ordered), ranks)]


class WholeMatrices:
    """Deals matrices to ranks, and brings each together on its own.

    Args:
        layout: the ranks, as `parameters` of all methods lie on them.
    """

    def __init__(self, layout: ParallelLayout) -> None:
        self._tp = _Ranks.of(layout.tp_group)
        is_shared = layout.shard_mesh is not None
        self._shards = _Ranks.of(layout.replica_mesh.get_group() if is_shared else None)
        self._copies = _Ranks.of(layout.replicate_group if is_shared else layout.dp_group)

    def check(self, parameter: Tensor) -> None:
        """Raises ValueError where a parameter cannot be dealt."""
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
        """The parameters in rounds, as `dealt` makes them."""
        return dealt(parameters, lambda parameter: parameter.shape, self._team * self._copies.size)

    @property
    def _team(self) -> int:
        """The ranks that hold one copy of everything."""
        return self._tp.size * self._shards.size

    def is_ours(self, number: int) -> bool:
        """Whether matrix `number` of a round is computed by ranks that hold other parts; else by those of a copy."""
        return number // self._team == self._copies.rank

    def computed(
        self,
        parameters: Sequence[nn.Parameter],
        parts: list[Tensor],
        function: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
    ) -> Iterator[Tensor]:
        """The function of each whole matrix of a round: this rank's part of it. Collective; take all of them.

        Args:
            parameters: at most one a rank, as `rounds` gives them.
            parts: this rank's part of each matrix that `is_ours`; all of one dtype. Empty afterwards.
            function: of a whole matrix, a matrix of its shape in `dtype`.
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
        """Send results from one of the ranks that hold copies to the others."""
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
        """`computed` for the matrices of the ranks that hold one copy."""
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
        """Tensor-parallel parts of this group's matrices, from the rows of all groups' matrices."""
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
        """This rank's rows of all groups' matrices, from the tensor-parallel parts of its own group's."""
        shards = self._shards
        if shards.size == 1:
            return list(parts)
        own = groups[shards.rank]
        sent = [[part[cut.rows(rank)] for part, cut in zip(parts, own, strict=True)] for rank in range(shards.size)]
        received = [[cut.shard_shape(shards.rank) for cut in group] for group in groups]
        return [part for arrived in _exchanged(sent, received, shards.group, dtype, device) for part in arrived]

    def _whole(self, cuts: Sequence[MatrixCut], parts: Sequence[Tensor]) -> Tensor | None:
        """The whole of this rank's matrix, from the parts of its tensor-parallel group; None where it has none."""
        tp = self._tp
        if tp.size == 1:
            return parts[0]
        own = cuts[tp.rank] if tp.rank < len(cuts) else None
        # Of a matrix that every rank holds whole its rank needs none from the others.
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
        """This rank's part of each matrix of its tensor-parallel group, from the ranks that hold them whole."""
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
    """The dimension that tensor-parallel ranks cut; None where each holds all."""
    assert isinstance(parameter, DTensor)
    placement = parameter.placements[-1]
    return placement.dim if isinstance(placement, Shard) else None


def _padded(lists: Sequence[list], size: int) -> list[list]:
    """One list a rank: empty for the ranks that a last round leaves out."""
    return [*lists, *([] for _ in range(size - len(lists)))]


def _exchanged(
    sent: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[tuple[int, int]]],
    group: dist.ProcessGroup | None,
    dtype: torch.dtype,
    device: torch.device,
) -> list[list[Tensor]]:
    """Tensors for each rank of the group, against those that each has for this one, in the order of the ranks.

    Args:
        sent: the tensors for each rank.
        shapes: of those that come from each rank.
        dtype: of all of them.
    """
    flat = torch.cat([torch.empty(0, dtype=dtype, device=device), *(part.reshape(-1) for to in sent for part in to)])
    sizes = [[math.prod(shape) for shape in from_rank] for from_rank in shapes]
    arrived = flat.new_empty(sum(map(sum, sizes)))
    counts = [sum(part.numel() for part in to) for to in sent]
    dist.all_to_all_single(arrived, flat, list(map(sum, sizes)), counts, group=group)
    pieces = iter(arrived.split([size for from_rank in sizes for size in from_rank]))
    return [[next(pieces).view(shape) for shape in from_rank] for from_rank in shapes]
