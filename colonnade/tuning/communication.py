"""What a rank sends in a step, computed from sizes alone: calls and bytes by group and collective.

The collectives are those of one `optimizer_step` in the library's default summation order; the deterministic mode uses
others. `tests/test_communication.py` counts them on real ranks. Bytes are those of the largest tensor of a call: an
all-reduce's tensor, an all-gather's output, a reduce-scatter's input, the larger of an all-to-all's input and output.

Letters as in `cost_model.py`; G is the number of ranks of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from colonnade.model_config import ModelConfig, layer_shapes
from colonnade.optim.overlapped_sum import SMALLEST_ALONE
from colonnade.parallel.head_loss import chunk_tokens
from colonnade.tuning.cost_model import BYTES, FLOAT32, Elements, ParallelConfig, local_shapes
from colonnade.tuning.orthogonalisation import matrix_traffic
from colonnade.tuning.traffic import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Computation, Traffic

DOUBLE = 8


def step_traffic(
    config: ModelConfig, parallel: ParallelConfig, micro_batch: int, block: int, accumulation: int
) -> list[Traffic]:
    """All collectives of a step whose micro-batches have `micro_batch` x `block` tokens; one-rank groups have none."""
    found: list[Traffic] = []
    if parallel.tp > 1:
        found += _tensor_parallel(config, parallel, micro_batch, block, accumulation)
    if parallel.shards > 1:
        found += _shared_out(config, parallel, accumulation)
    elif parallel.dp > 1:
        found.append(_gradients(config, parallel))
    if parallel.optimizer == "muon":
        found += matrix_traffic(config, parallel)
    return [traffic for traffic in found if traffic.calls]


# ---------------------------------------------------------------------------------------------- tensor-parallel ranks


def _tensor_parallel(
    config: ModelConfig, parallel: ParallelConfig, micro_batch: int, block: int, accumulation: int
) -> Iterator[Traffic]:
    tp, layers = parallel.tp, config.num_hidden_layers
    halves = 2 if parallel.overlap_collectives and micro_batch > 1 else 1
    # Sequence parallelism pads the tokens of each half to a multiple of tp.
    rows = [len(part) * block for part in _chunks(micro_batch, halves)]
    if parallel.sequence_parallel:
        rows = [-(-count // tp) * tp for count in rows]
    width = config.hidden_size * BYTES[parallel.precision]
    whole = accumulation * width * sum(rows)
    calls = accumulation * halves
    # In the layers, one half of the micro-batch computes while the other waits for a collective.
    other_half: Computation | None = "step" if halves == 2 else None

    def passes(what: str, collective: str, times: int, behind: Computation | None = None) -> Traffic:
        """A collective that runs `times` times on each half of every micro-batch."""
        return Traffic("tp", what, collective, tp, calls * times, whole * times, behind)

    def of_f(collective: str) -> Iterator[Traffic]:
        """The sums that f makes in the backward pass."""
        late = parallel.overlap_weight_gradients
        attention: Computation | None = other_half or ("gradients of q, k, v" if late else None)
        feed_forward: Computation | None = other_half or ("gradients of gate, up" if late else None)
        yield passes("layers, backward: attention", collective, layers, attention)
        yield passes("layers, backward: feed-forward", collective, layers, feed_forward)

    embedded = 0 if parallel.replicate_embeddings else 1
    is_full = parallel.activation_checkpointing == "full"
    # Recomputation stops once the last product's input exists, before the second g; with two halves it includes that g.
    again = layers * is_full * halves
    if parallel.sequence_parallel:
        yield passes("embedding", REDUCE_SCATTER, embedded)
        yield passes("embedding", ALL_GATHER, 1)  # backward, also if a rank takes its tokens of a replicated embedding
        yield passes("layers", ALL_GATHER, 4 * layers, other_half)
        yield passes("layers", REDUCE_SCATTER, 2 * layers, other_half)
        yield from of_f(REDUCE_SCATTER)
        yield passes("layers, computed again", ALL_GATHER, 2 * layers * is_full, other_half)
        yield passes("layers, computed again", REDUCE_SCATTER, again, other_half)
        yield passes("head", ALL_GATHER, 1)
        yield passes("head", REDUCE_SCATTER, embedded)
        yield _whole_parameters(config, parallel, accumulation)
    else:
        yield passes("embedding", ALL_REDUCE, embedded)
        yield passes("layers", ALL_REDUCE, 2 * layers, other_half)
        yield from of_f(ALL_REDUCE)
        yield passes("layers, computed again", ALL_REDUCE, again, other_half)
        yield passes("head", ALL_REDUCE, embedded)
    if not parallel.replicate_embeddings:
        yield _statistics(parallel, micro_batch * block, accumulation)
    yield _key_value_gradients(config, parallel, accumulation)
    yield _head_norm_gradients(config, parallel, accumulation)
    yield Traffic("tp", "norm of gradients", ALL_REDUCE, tp, 1, 2 * DOUBLE)


def _chunks(count: int, parts: int) -> list[range]:
    """The row ranges into which `Tensor.chunk` splits `count` rows."""
    size = -(-count // parts)
    return [range(begin, min(begin + size, count)) for begin in range(0, count, size)]


def _statistics(parallel: ParallelConfig, tokens: int, accumulation: int) -> Traffic:
    """For each chunk of tokens: every rank's softmax maximum, sum of exponentials and target logit."""
    import torch

    chunk = chunk_tokens(tokens, torch.float32 if parallel.precision == "fp32" else torch.bfloat16)
    size = accumulation * parallel.tp * 3 * tokens * FLOAT32
    return Traffic("tp", "statistics of the loss", ALL_GATHER, parallel.tp, accumulation * -(-tokens // chunk), size)


def _times_a_step(parallel: ParallelConfig, accumulation: int) -> int:
    """How often tp ranks sum parameters' gradients in a step: once if weights are kept across micro-batches."""
    return 1 if parallel.shards == 1 else accumulation


def _whole_parameters(config: ModelConfig, parallel: ParallelConfig, accumulation: int) -> Traffic:
    """Sums for replicated norms and biases: each rank applies them to its share of the tokens only."""
    times = _times_a_step(parallel, accumulation)
    used = [
        (math.prod(shape), count)
        for name, shape, count in local_shapes(config, parallel)
        if name.endswith(("layernorm.weight", "model.norm.weight", "o_proj.bias", "down_proj.bias"))
    ]
    calls = times * sum(count for _, count in used)
    size = times * FLOAT32 * sum(numel * count for numel, count in used)
    return Traffic("tp", "gradients of norms", ALL_REDUCE, parallel.tp, calls, size)


def _key_value_gradients(config: ModelConfig, parallel: ParallelConfig, accumulation: int) -> Traffic:
    """With fewer key/value heads than ranks, their parameters are replicated and the gradients are summed."""
    calls = size = 0
    if config.num_key_value_heads % parallel.tp:
        times = _times_a_step(parallel, accumulation)
        for name, shape, count in local_shapes(config, parallel):
            if "k_proj" in name or "v_proj" in name:
                calls += times * count
                size += times * count * FLOAT32 * math.prod(shape)
    return Traffic("tp", "gradients of shared key/value heads", ALL_REDUCE, parallel.tp, calls, size)


def _head_norm_gradients(config: ModelConfig, parallel: ParallelConfig, accumulation: int) -> Traffic:
    calls = _times_a_step(parallel, accumulation) * config.num_hidden_layers if config.qk_norm else 0
    size = calls * 2 * config.head_dim * FLOAT32
    return Traffic("tp", "gradients of norms of heads", ALL_REDUCE, parallel.tp, calls, size)


# ------------------------------------------------------------------------------------------------ data-parallel ranks


def _gradients(config: ModelConfig, parallel: ParallelConfig) -> Traffic:
    """With overlap: one all-reduce per large gradient during the last backward pass, one for all others and the loss.

    Without overlap the same after the backward pass.
    """
    sizes = [(name, FLOAT32 * math.prod(shape), count) for name, shape, count in local_shapes(config, parallel)]
    if not parallel.overlaps_gradients:
        alone = _sent_alone((size, count) for _, size, count in sizes)
        total = sum(size * count for _, size, count in sizes)
        return Traffic("dp", "gradients and loss", ALL_REDUCE, parallel.dp, alone + 1, total + FLOAT32)
    of = {name: size for name, size, _ in sizes}
    layers = config.num_hidden_layers
    shared = config.num_key_value_heads % parallel.tp != 0
    # If key/value parameters are replicated over tp, a rank's joined weight contains one head of them.
    part = config.num_key_value_heads if shared else 1
    key_value = (of["self_attn.k_proj.weight"] + of["self_attn.v_proj.weight"]) // part
    matrices = [
        of["self_attn.q_proj.weight"] + key_value,
        of["self_attn.o_proj.weight"],
        of["mlp.gate_proj.weight"] + of["mlp.up_proj.weight"],
        of["mlp.down_proj.weight"],
    ]
    outside = [(size, 1) for name, size, _ in sizes if name not in layer_shapes(config)]
    alone = _sent_alone([*((size, layers) for size in matrices), *outside])
    total = sum(size * count for _, size, count in sizes)
    for name in ("k_proj.weight", "v_proj.weight", "k_proj.bias", "v_proj.bias"):
        whole = of.get(f"self_attn.{name}", 0)
        total -= layers * (whole - whole // part)
    return Traffic(
        "dp", "gradients and loss", ALL_REDUCE, parallel.dp, alone + 1, total + FLOAT32, "last backward pass"
    )


def _shared_out(config: ModelConfig, parallel: ParallelConfig, accumulation: int) -> Iterator[Traffic]:
    shards, layers = parallel.shards, config.num_hidden_layers
    padded = {"block": 0, "outside": 0}
    for name, shape, _ in local_shapes(config, parallel):
        padded["block" if name in layer_shapes(config) else "outside"] += (
            -(-shape[0] // shards) * shards * math.prod(shape[1:])
        )
    is_zero3 = parallel.data_parallel_shard == "zero3"
    times = accumulation if is_zero3 else 1
    behind: Computation = "step" if is_zero3 else "micro-batch"
    block, outside = parallel.gather_bytes * padded["block"], FLOAT32 * padded["outside"]
    passes = 2 * times if is_zero3 else 1  # forward, and again backward
    gathers = passes * layers
    yield Traffic("dp", "layers' parameters", ALL_GATHER, shards, gathers, gathers * block, behind)
    yield Traffic("dp", "embedding's and head's parameters", ALL_GATHER, shards, times, times * outside)
    size = FLOAT32 * (layers * padded["block"] + padded["outside"])
    yield Traffic("dp", "gradients", REDUCE_SCATTER, shards, times * (layers + 1), times * size, behind)
    yield Traffic("dp", "norm of gradients", ALL_REDUCE, shards, 1, 3 * DOUBLE)
    yield Traffic("dp", "loss", ALL_REDUCE, parallel.dp, 1, FLOAT32)
    if parallel.replicas > 1:
        # Of the first shard, which holds as many rows as any.
        own = [
            (FLOAT32 * -(-shape[0] // shards) * math.prod(shape[1:]), count)
            for _, shape, count in local_shapes(config, parallel)
        ]
        alone = _sent_alone(own)
        calls = alone + (alone < sum(count for _, count in own))
        size = FLOAT32 * Elements.of(config, parallel).own
        yield Traffic("replicas", "gradients", ALL_REDUCE, parallel.replicas, calls, size)


def _sent_alone(sizes: Iterable[tuple[int, int]]) -> int:
    """How many of these gradients (bytes, count) are large enough for a collective each; the others share one."""
    return sum(count for size, count in sizes if size >= SMALLEST_ALONE)
