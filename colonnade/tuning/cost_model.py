"""The memory a step needs, computed from sizes alone: bytes of a rank by kind.

The memory is that of the tensors at the peak of a step. It excludes what allocators, communication libraries and
kernels take in addition. Activations are those that the eager functions keep for the backward pass (in
`colonnade/decoder/layers.py`, `elementwise.py` and `head_loss.py`); compiled segments may keep others.
`tests/test_cost_model.py` and `benchmarks/cost_model.py` compare the result with the bytes that torch allocates.

Letters: M tokens of a micro-batch (B x T), R those of them whose residual stream a rank holds; H hidden; n, k query
and key heads on a rank; D head size; i feed-forward channels and v vocabulary entries of a rank; e bytes per
activation element, 2 or 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from colonnade.model_config import ModelConfig, layer_shapes, outer_shapes
from colonnade.optim.parameter_groups import is_hidden_matrix
from colonnade.parallel.sharding import cut_of, is_vocabulary
from colonnade.tuning.flops import training_flops_per_token

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FLOAT32 = 4


@dataclass(frozen=True)
class ParallelConfig:
    """The settings that determine what a rank holds and sends.

    Attributes:
        tp, dp: number of tensor-parallel and of data-parallel ranks.
        precision: of activations and matrix products: fp32, bf16 or fp16.
        optimizer: adamw or muon.
        activation_checkpointing: none, selective or full, as in `TensorParallelModel`.
        data_parallel_shard: none, zero2 or zero3, as in `shard_over_data_parallel`.
        overlap_weight_gradients: as in `TensorParallelModel`; it affects which collectives a rank has to wait for.
        overlaps_gradients: without sharding, data-parallel gradients are summed during the backward pass.
        replicas: number of data-parallel groups that each shard a full copy of the model (hybrid sharding).
        deterministic: the gradients of micro-batches wait for each other in the summation tree. The partial results of
            several slices on one rank are not counted.
        on_cpu: whether the ranks run on CPUs.
    """

    tp: int = 1
    dp: int = 1
    precision: str = "bf16"
    optimizer: str = "adamw"
    activation_checkpointing: str = "full"
    sequence_parallel: bool = False
    overlap_collectives: bool = False
    overlap_weight_gradients: bool = True
    overlaps_gradients: bool = True
    data_parallel_shard: str = "none"
    replicas: int = 1
    replicate_embeddings: bool = False
    deterministic: bool = False
    on_cpu: bool = False

    @property
    def shards(self) -> int:
        """Number of data-parallel ranks that shard one copy of the parameters; 1 if each holds all of them."""
        return 1 if self.data_parallel_shard == "none" else self.dp // self.replicas

    @property
    def repeats_heads(self) -> bool:
        """Whether attention repeats each key/value head for its group of queries (`takes_groups` in `attention.py`).

        GPUs before Ampere also do so in fp16; this model ignores that.
        """
        return self.on_cpu or self.precision == "fp32"

    @property
    def gather_bytes(self) -> int:
        """Bytes per element when a block's sharded parameters are all-gathered."""
        return FLOAT32 if self.deterministic else BYTES[self.precision]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by kind.

    Attributes:
        parameters: this rank's parameters, float32.
        weights: what matrix products need in addition: copies in another dtype, and parameters that data-parallel ranks
            shard and have all-gathered.
        gradients: float32, as held between two micro-batches; in the deterministic mode, in the tree over all of them.
        optimizer: the optimizer's moments, float32: two for AdamW, one for the matrices that Muon updates.
        activations: what the forward pass keeps for the backward pass.
        logits: what head and loss hold in addition to the activations: logits of a chunk of tokens, gradients of the
            head.
        layer: what the backward pass of a layer holds in addition to the activations: its internal gradients and its
            recomputed activations.
        total: the peak of a step. `logits` and `layer` peak at different times, so the fields do not add up to it.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    layer: int
    total: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


def local_shapes(config: ModelConfig, parallel: ParallelConfig) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """For each kind of parameter: its name, its shape on a tensor-parallel rank, and how many of it the model has."""
    repeats = [(name, shape, 1) for name, shape in outer_shapes(config).items()]
    repeats += [(name, shape, config.num_hidden_layers) for name, shape in layer_shapes(config).items()]
    for name, shape, count in repeats:
        rows = config.padded_vocab_size if is_vocabulary(name) else shape[0]
        sizes = [rows, *shape[1:]]
        cut = cut_of(name, config, parallel.tp, replicate_embeddings=parallel.replicate_embeddings)
        if cut.sharded:
            sizes[cut.dim] = -(-sizes[cut.dim] // parallel.tp)
        yield name, tuple(sizes), count


@dataclass(frozen=True)
class Elements:
    """Element counts of a tensor-parallel rank's parameters, before data-parallel ranks shard them unless noted.

    Attributes:
        block: of one layer.
        outside: of embedding, last norm and head.
        table: of the head, which may be the embedding.
        projections: of the matrices, and their biases, of all layers.
        joined: of one layer's matrices that are joined from several parameters (q, k, v; gate, up).
        gate_up, down: of one layer's feed-forward matrices.
        own: of all parameters, what one data-parallel rank holds after sharding.
        moments: of the optimizer's moments for what that rank holds.
    """

    block: int
    outside: int
    table: int
    projections: int
    joined: int
    gate_up: int
    down: int
    own: int
    moments: int

    @classmethod
    def of(cls, config: ModelConfig, parallel: ParallelConfig) -> Elements:
        found = {"block": 0, "outside": 0, "projections": 0, "own": 0, "moments": 0}
        sizes: dict[str, int] = {}
        for name, shape, count in local_shapes(config, parallel):
            numel = sizes[name] = math.prod(shape)
            is_of_block = name in layer_shapes(config)
            found["block" if is_of_block else "outside"] += numel
            found["projections"] += numel * count if "_proj." in name else 0
            # Sharded by rows; the first rank holds the most.
            own = -(-shape[0] // parallel.shards) * math.prod(shape[1:]) * count
            found["own"] += own
            found["moments"] += own * (1 if parallel.optimizer == "muon" and is_hidden_matrix(name, len(shape)) else 2)
        attention = sum(size for name, size in sizes.items() if name.endswith(("q_proj.weight", "k_proj.weight")))
        attention += sizes["self_attn.v_proj.weight"]
        gate_up = sizes["mlp.gate_proj.weight"] + sizes["mlp.up_proj.weight"]
        return cls(
            table=sizes.get("lm_head.weight", sizes["model.embed_tokens.weight"]),
            joined=attention + gate_up,
            gate_up=gate_up,
            down=sizes["mlp.down_proj.weight"],
            **found,
        )


@dataclass(frozen=True)
class _Step:
    """The memory of one step on one rank; sizes are in bytes."""

    config: ModelConfig
    parallel: ParallelConfig
    micro_batch: int
    block: int
    accumulation: int

    @property
    def e(self) -> int:
        return BYTES[self.parallel.precision]

    @property
    def is_half(self) -> bool:
        return self.e != FLOAT32

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.block

    @property
    def stream(self) -> int:
        """The residual stream of the tokens that this rank holds."""
        rows = -(-self.tokens // self.parallel.tp) if self.parallel.sequence_parallel else self.tokens
        return rows * self.config.hidden_size * self.e

    @property
    def whole(self) -> int:
        """The residual stream of all tokens."""
        return self.tokens * self.config.hidden_size * self.e

    @property
    def inner(self) -> int:
        """One activation tensor inside the feed-forward."""
        return self.tokens * self.config.intermediate_size // self.parallel.tp * self.e

    @cached_property
    def elements(self) -> Elements:
        return Elements.of(self.config, self.parallel)

    @property
    def attention(self) -> int:
        """What attention keeps: rotated queries and keys in one tensor; keys and values; the output; log-sum-exps."""
        config, tp = self.config, self.parallel.tp
        heads, shared = config.num_attention_heads // tp, max(1, config.num_key_value_heads // tp)
        rotated, projected = heads + shared, heads + 2 * shared
        if self.parallel.repeats_heads and shared < heads:
            kept = rotated + 2 * heads  # the projection itself is kept only for per-head norms
            kept += projected if config.qk_norm else 0
        else:
            kept = rotated + projected
        factors = rotated if config.qk_norm else 0
        return self.tokens * ((kept + heads) * config.head_dim * self.e + FLOAT32 * (heads + factors))

    @property
    def layer_kept(self) -> int:
        """What a layer's forward pass keeps: inputs and outputs of two norms, attention, gate, up and their product."""
        factors = 2 * FLOAT32 * self.stream // (self.config.hidden_size * self.e)
        return 2 * self.stream + 2 * self.whole + factors + self.attention + 3 * self.inner

    @property
    def joins(self) -> int:
        """Joined weights of one layer: with sharded parameters they are not kept across micro-batches."""
        return self.e * self.elements.joined if self.parallel.shards > 1 else 0

    @property
    def activations(self) -> int:
        layers, checkpointing = self.config.num_hidden_layers, self.parallel.activation_checkpointing
        last = self.stream  # what the last norm keeps
        if checkpointing == "full":
            return layers * self.stream + last  # each layer's input
        kept = self.layer_kept + self.joins
        return layers * (kept - 3 * self.inner if checkpointing == "selective" else kept) + last

    @property
    def layer(self) -> int:
        """In the feed-forward's backward pass: recomputed activations, and the gradients of its activations."""
        again = {"none": 0, "selective": 3 * self.inner, "full": self.layer_kept + self.joins}
        streams = 2 if self.parallel.overlap_collectives and self.micro_batch > 1 else 1
        of_weight = FLOAT32 + (self.e if self.is_half else 0)
        # The product is freed; gradients of it, of gate and of up, and of one intermediate are added.
        inside = 3 * self.inner // streams
        # Gate and up are freed as well; their weight's gradient exists in the products' dtype before it is accumulated.
        after = (self.whole - self.inner) // streams + of_weight * self.elements.gate_up
        gradients = 0
        if self.parallel.shards > 1:
            gradients = self.head_waiting + self.parallel.gather_bytes * self.elements.down
        # The residual stream's gradient replaces what the last norm kept.
        return again[self.parallel.activation_checkpointing] + max(inside, after) + gradients

    @property
    def logits(self) -> int:
        """At the last chunk of tokens: the gradients of the head and of its input, and what the chunk needs."""
        # Imported here because flags are parsed without torch.
        import torch

        from colonnade.parallel.head_loss import SOFTMAX_PART, chunk_tokens, row_block_of

        hidden, table = self.config.hidden_size, self.elements.table
        entries = table // hidden
        chunk = min(chunk_tokens(self.tokens, torch.bfloat16 if self.is_half else torch.float32), self.tokens)
        of_rows = 3 * FLOAT32 * chunk * hidden
        wide = FLOAT32 * (chunk // SOFTMAX_PART) * entries if self.is_half else 0
        rows = row_block_of(chunk, entries, hidden, on_cpu=self.parallel.on_cpu)
        row_block = (self.e + FLOAT32) * rows * hidden if self.is_half else 0
        views = self.stream + self.whole + (self.whole if self.parallel.sequence_parallel else 0)
        return self.whole + FLOAT32 * table + views + self.e * chunk * entries + max(of_rows, wide, row_block)

    @property
    def weights(self) -> int:
        elements, parallel = self.elements, self.parallel
        head = self.e * elements.table if self.is_half else 0
        if parallel.shards == 1:
            return head + (self.e * elements.projections if self.is_half else 0)
        # zero3 holds the current block and prefetches the next one.
        blocks = 2 if parallel.data_parallel_shard == "zero3" else self.config.num_hidden_layers
        blocks = min(blocks, self.config.num_hidden_layers)
        return head + FLOAT32 * elements.outside + parallel.gather_bytes * blocks * elements.block

    @property
    def whole_gradients(self) -> int:
        """The gradients of this rank's tensor-parallel part, before data-parallel ranks shard them."""
        return FLOAT32 * (self.elements.outside + self.config.num_hidden_layers * self.elements.block)

    @property
    def waiting_gradients(self) -> int:
        """In the deterministic mode, gradients of earlier micro-batches when the last one begins: one copy per level of
        the tree, and whole ones if data-parallel ranks shard the parameters."""
        if not self.parallel.deterministic:
            return 0
        levels = (self.accumulation - 1).bit_length()
        return levels * self.whole_gradients

    @property
    def adds_whole_gradients(self) -> bool:
        """Whether whole gradients accumulate over the micro-batches before they are reduce-scattered."""
        if self.parallel.deterministic:
            return False
        return self.parallel.data_parallel_shard == "zero2" and self.parallel.shards > 1 and self.accumulation > 1

    @property
    def head_waiting(self) -> int:
        """With sharded parameters, the head's whole gradient, which is held until the end of the backward pass."""
        return 0 if self.parallel.shards == 1 or self.adds_whole_gradients else FLOAT32 * self.elements.table

    @property
    def gradients(self) -> int:
        if self.adds_whole_gradients:
            return self.whole_gradients
        return FLOAT32 * self.elements.own + self.waiting_gradients

    @property
    def end_of_block(self) -> int:
        """With zero2 and zero3, a whole block's gradients while they are reduce-scattered."""
        if self.parallel.shards == 1:
            return 0
        gathered = self.parallel.gather_bytes
        return (gathered + (FLOAT32 if self.is_half else 0)) * self.elements.block + self.head_waiting

    @property
    def embedding(self) -> int:
        """In the embedding's backward pass, the last one: existing and new gradients, and the residual stream's."""
        elements, is_tied = self.elements, self.config.tie_word_embeddings
        stream = FLOAT32 * self.tokens * self.config.hidden_size
        table, outside = FLOAT32 * elements.table, FLOAT32 * elements.outside
        # A tied head's gradient exists already, and the embedding's is added to it.
        arriving = 2 * table if is_tied else table
        shards = self.parallel.shards
        if shards == 1:
            return self.gradients + stream + arriving - (table if self.accumulation == 1 else 0)
        # The last block's gradients are being reduce-scattered.
        there = stream + FLOAT32 * (elements.own - elements.outside // shards + elements.block) + outside
        if self.adds_whole_gradients:
            there += arriving
        else:
            there += arriving - table + (FLOAT32 * elements.outside // shards if self.accumulation > 1 else 0)
        return there - (self.weights - outside)  # of `weights`, only what lies outside the blocks is not freed yet

    def worst(self) -> int:
        """The peak of gradients, activations and temporary tensors together."""
        parallel, elements = self.parallel, self.elements
        if parallel.deterministic and self.accumulation > 1:
            # The last micro-batch's gradients are created as if it were the only one.
            return self.waiting_gradients + replace(self, accumulation=1).worst()
        is_full = parallel.activation_checkpointing == "full"
        first_layer = self.stream if is_full else self.activations // self.config.num_hidden_layers
        in_layer = max(self.activations + self.layer, self.activations - first_layer + self.end_of_block)
        # With tied embeddings, the head's gradient is held until the embedding's is computed.
        is_tied = self.config.tie_word_embeddings
        head = FLOAT32 * elements.table
        waiting = head if is_tied and not self.head_waiting else 0
        if self.accumulation > 1:
            in_pass = self.gradients + max(self.activations + self.logits, in_layer + waiting)
            return max(in_pass, self.embedding)
        # In a step of one micro-batch, gradients are created while activations are freed.
        is_shared = parallel.shards > 1
        missing = 0 if is_shared else FLOAT32 * elements.block + (0 if is_tied else head)
        return max(
            self.activations + self.logits,
            in_layer + (0 if is_shared else head),  # if sharded, `in_layer` includes the head's gradient
            first_layer + self.layer + self.gradients - missing,
            self.embedding,
        )


def state_memory(config: ModelConfig, parallel: ParallelConfig) -> tuple[int, int, int]:
    """Bytes of a rank's parameters, gradients and optimizer moments, all float32."""
    elements = Elements.of(config, parallel)
    return FLOAT32 * elements.own, FLOAT32 * elements.own, FLOAT32 * elements.moments


def step_memory(
    config: ModelConfig, parallel: ParallelConfig, micro_batch: int, block: int, accumulation: int = 2
) -> Memory:
    """What a rank holds at the peak of a step whose micro-batches have `micro_batch` x `block` tokens.

    Args:
        accumulation: micro-batches per step; from the second on, gradients exist already.
    """
    parameters, _, moments = state_memory(config, parallel)
    step = _Step(config, parallel, micro_batch, block, accumulation)
    return Memory(
        parameters=parameters,
        weights=step.weights,
        gradients=step.gradients,
        optimizer=moments,
        activations=step.activations,
        logits=step.logits,
        layer=step.layer,
        total=parameters + step.weights + moments + step.worst(),
    )


def run_flops(config: ModelConfig, tokens: int, block: int) -> int:
    """FLOPs of training on `tokens` tokens (`training_flops_per_token`)."""
    return tokens * training_flops_per_token(
        config.num_parameters_without_embeddings,
        config.num_hidden_layers,
        config.num_attention_heads * config.head_dim,
        block,
        config.vocab_size,
        config.hidden_size,
    )
