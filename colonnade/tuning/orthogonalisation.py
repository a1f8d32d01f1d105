"""What Muon adds to a step: exchanging matrices between ranks, and the Newton-Schulz iterations on each whole one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from colonnade.model_config import ModelConfig, layer_shapes
from colonnade.optim.muon import newton_schulz_flops
from colonnade.optim.parameter_groups import is_hidden_matrix
from colonnade.optim.whole_matrices import MatrixCut, dealt
from colonnade.parallel.sharding import cut_of
from colonnade.tuning.cost_model import BYTES, FLOAT32, ParallelConfig
from colonnade.tuning.traffic import ALL_TO_ALL, BROADCAST, Traffic


def matrix_traffic(config: ModelConfig, parallel: ParallelConfig) -> list[Traffic]:
    """The exchanges of `WholeMatrices` in a step with Muon, counted for the first rank.

    Momentum is sent in float32 to assemble each whole matrix; results come back in the dtype of the iterations.
    """
    tp, shards, copies = parallel.tp, parallel.shards, parallel.dp // parallel.shards
    result_bytes = FLOAT32 if parallel.on_cpu else BYTES["bf16"]
    both_ways = FLOAT32 + result_bytes
    calls: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for matrices in _rounds(config, parallel):
        of_copy = matrices[: tp * shards]
        own = of_copy[:tp]
        if shards > 1:  # this rank's rows of all matrices, or all rows of its own group's matrices, if that is more
            here, there = sum(_rows_of_first(cut) for cut in of_copy), sum(_part(cut) for cut in own)
            calls["rows"] += 2
            sizes["rows"] += max(here, there) * both_ways
        if tp > 1:
            first = own[0]
            # For a matrix replicated over tp, no parts are sent to the rank that computes it, but all ranks receive the
            # result.
            whole = _part(first) * (1 if first.dim is None else tp)
            sent = sum(_part(cut) for cut in own if cut.dim is not None or cut is first)
            calls["parts"] += 2
            sizes["parts"] += max(whole, sent) * FLOAT32
            sizes["parts"] += max(tp * _part(first), sum(_part(cut) for cut in own)) * result_bytes
        if copies > 1:
            calls["results"] += len(matrices)
            sizes["results"] += sum(_rows_of_first(cut) for cut in matrices) * result_bytes

    def of(what: str, group: str, collective: str, ranks: int) -> Traffic:
        return Traffic(group, f"Muon: {what} of matrices", collective, ranks, calls[what], sizes[what])

    return [
        of("rows", "dp", ALL_TO_ALL, shards),
        of("parts", "tp", ALL_TO_ALL, tp),
        of("results", "dp" if shards == 1 else "replicas", BROADCAST, copies),
    ]


def orthogonalisation_flops(config: ModelConfig, parallel: ParallelConfig) -> int:
    """The FLOPs on the critical path: those of the largest matrix of each round, which the other ranks wait for.

    All matrices have one side H, so the one with the most elements takes the most FLOPs.
    """
    largest = (matrices[0] for matrices in _rounds(config, parallel))
    return sum(newton_schulz_flops(_whole_shape(cut, parallel.tp)) for cut in largest)


def _rounds(config: ModelConfig, parallel: ParallelConfig) -> list[list[MatrixCut]]:
    def cuts() -> Iterator[MatrixCut]:
        for name, shape in layer_shapes(config).items():
            if is_hidden_matrix(name, len(shape)):
                cut = cut_of(name, config, parallel.tp)
                yield MatrixCut.of(shape, cut.dim if cut.sharded else None, parallel.tp, parallel.shards)

    matrices = [cut for _ in range(config.num_hidden_layers) for cut in cuts()]
    return dealt(matrices, lambda cut: _whole_shape(cut, parallel.tp), parallel.tp * parallel.dp)


def _whole_shape(cut: MatrixCut, tp: int) -> tuple[int, int]:
    rows, columns = cut.shape
    return rows * (tp if cut.dim == 0 else 1), columns * (tp if cut.dim == 1 else 1)


def _part(cut: MatrixCut) -> int:
    """Elements of one tensor-parallel rank's part of the matrix."""
    return math.prod(cut.shape)


def _rows_of_first(cut: MatrixCut) -> int:
    """Elements of that part which the first data-parallel rank holds, if they shard it by rows."""
    return math.prod(cut.shard_shape(0))
