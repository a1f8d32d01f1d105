"""What a step holds in memory, computed from sizes alone: bytes of a rank by kind.

The memory is that of the tensors, at the moment of a step when most of them live. What allocators, communication
libraries and kernels take besides is not in it. Activations are those that the eager functions keep for the backward
pass (`colonnade/parallel/layers.py`, `elementwise.py`, `head_loss.py` beside it); compiled segments may keep others.
`tests/test_cost_model.py` and `benchmarks/cost_model.py` compare with the bytes that torch allocates.

Letters: M tokens of a micro-batch (B x T), R those of them whose residual stream a rank holds; H hidden; n, k heads of
queries and of keys on a rank; D head size; i feed-forward channels and v vocabulary entries of a rank; e bytes of an
activation, 2 or 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property

from colonnade.model_config import ModelConfig, layer_shapes, outer_shapes
from colonnade.optim.parameter_groups import is_hidden_matrix
from colonnade.parallel.sharding import cut_of, is_vocabulary
from colonnade.tuning.flops import training_flops_per_token

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FLOAT32 = 4


@dataclass(frozen=True)
class ParallelConfig:
    """What decides what a rank holds and sends.

    Attributes:
        tp, dp: tensor-parallel ranks, and data-parallel ones.
        precision: of activations and matrix products: fp32, bf16 or fp16.
        optimizer: adamw or muon.
        activation_checkpointing: none, selective or full, as in `TensorParallelModel`.
        data_parallel_shard: none, zero2 or zero3, as in `shard_over_data_parallel`.
        overlap_weight_gradients: as in `TensorParallelModel`: it changes what a rank waits for.
        overlaps_gradients: those that each data-parallel rank holds are summed during the backward pass.
        replicas: groups of data-parallel ranks that each share out the model by themselves.
        on_cpu: ranks are on a CPU.
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
    on_cpu: bool = False

    @property
    def shards(self) -> int:
        """Data-parallel ranks that share out one copy of the parameters; 1 where each has them all."""
        return 1 if self.data_parallel_shard == "none" else self.dp // self.replicas

    @property
    def repeats_heads(self) -> bool:
        """Whether attention copies each key/value head for its queries (`takes_groups` in `attention.py`).

        In fp16 it does so before Ampere too, which is not counted.
        """
        return self.on_cpu or self.precision == "fp32"

    @property
    def gather_bytes(self) -> int:
        """Bytes an element that a block's shared-out parameters are brought together in."""
        return BYTES[self.precision]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by kind.

    Attributes:
        parameters: float32, of this rank.
        weights: what products take beside them: copies in another dtype, and parameters that data-parallel ranks share
            out and have brought together.
        gradients: float32, as they are between two micro-batches.
        optimizer: its moments, float32: two of AdamW, one of Muon.
        activations: what the forward pass keeps for the backward pass.
        logits: what head and loss hold beside the activations: logits of a chunk of tokens, gradients of the head.
        layer: what the backward pass of a layer holds beside the activations: gradients inside of it, and what is
            computed again.
        total: at the worst moment. `logits` and `layer` have moments of their own, so they do not add up.
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
    """Of each kind of parameter its name, its shape on a tensor-parallel rank, and how many there are."""
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
    """Elements of a tensor-parallel rank's parameters, before data-parallel ranks share them out.

    Attributes:
        block: of one layer; outside: of embedding, last norm and head.
        table: of the head, which may be the embedding.
        projections: matrices and their biases of all layers.
        joined: of one layer, those matrices that are joined from several.
        gate_up, down: of one layer.
        own: what one data-parallel rank holds of all.
        moments: of the optimizer, for what it holds.
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
            # Cut by rows; the first rank has the most.
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
    """The sizes of one step on one rank; every property is in bytes."""

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
        """The residual stream, as this rank holds it."""
        rows = -(-self.tokens // self.parallel.tp) if self.parallel.sequence_parallel else self.tokens
        return rows * self.config.hidden_size * self.e

    @property
    def whole(self) -> int:
        """All tokens of the residual stream."""
        return self.tokens * self.config.hidden_size * self.e

    @property
    def inner(self) -> int:
        """One activation of the feed-forward."""
        return self.tokens * self.config.intermediate_size // self.parallel.tp * self.e

    @cached_property
    def elements(self) -> Elements:
        return Elements.of(self.config, self.parallel)

    @property
    def attention(self) -> int:
        """Rotated queries and keys in one tensor; keys and values; the result; sums of exponentials."""
        config, tp = self.config, self.parallel.tp
        heads, shared = config.num_attention_heads // tp, max(1, config.num_key_value_heads // tp)
        rotated, projected = heads + shared, heads + 2 * shared
        if self.parallel.repeats_heads and shared < heads:
            kept = rotated + 2 * heads  # the projection itself is kept by norms of heads alone
            kept += projected if config.qk_norm else 0
        else:
            kept = rotated + projected
        factors = rotated if config.qk_norm else 0
        return self.tokens * ((kept + heads) * config.head_dim * self.e + FLOAT32 * (heads + factors))

    @property
    def layer_kept(self) -> int:
        """Of a layer's forward pass: two norms' inputs and results, attention, gate and up, their product."""
        factors = 2 * FLOAT32 * self.stream // (self.config.hidden_size * self.e)
        return 2 * self.stream + 2 * self.whole + factors + self.attention + 3 * self.inner

    @property
    def joins(self) -> int:
        """Joined weights of one layer, which are not kept over micro-batches where parameters are shared out."""
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
        """In the feed-forward's backward pass: what is computed again, and the gradients of its activations."""
        again = {"none": 0, "selective": 3 * self.inner, "full": self.layer_kept + self.joins}
        streams = 2 if self.parallel.overlap_collectives and self.micro_batch > 1 else 1
        of_weight = FLOAT32 + (self.e if self.is_half else 0)
        # The product is gone; gradients of it, of gate and up, and one of what is between.
        inside = 3 * self.inner // streams
        # Gate and up are gone as well; the gradient of their weight, in its own dtype before it is added.
        after = (self.whole - self.inner) // streams + of_weight * self.elements.gate_up
        gradients = 0
        if self.parallel.shards > 1:
            gradients = self.head_waiting + self.parallel.gather_bytes * self.elements.down
        # The stream's gradient takes the place of what the last norm kept.
        return again[self.parallel.activation_checkpointing] + max(inside, after) + gradients

    @property
    def logits(self) -> int:
        """At the last chunk of tokens: the head's gradients, and the chunk."""
        # Here, since the settings' flags are parsed without torch.
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
        # Under zero3 the block at hand, and the next one on its way.
        blocks = 2 if parallel.data_parallel_shard == "zero3" else self.config.num_hidden_layers
        blocks = min(blocks, self.config.num_hidden_layers)
        return head + FLOAT32 * elements.outside + parallel.gather_bytes * blocks * elements.block

    @property
    def adds_whole_gradients(self) -> bool:
        """Whether micro-batches add up before the ranks share out their sum."""
        return self.parallel.data_parallel_shard == "zero2" and self.parallel.shards > 1 and self.accumulation > 1

    @property
    def head_waiting(self) -> int:
        """Where parameters are shared out, the head's gradient until the end of the backward pass."""
        return 0 if self.parallel.shards == 1 or self.adds_whole_gradients else FLOAT32 * self.elements.table

    @property
    def gradients(self) -> int:
        if self.adds_whole_gradients:
            elements = self.elements
            return FLOAT32 * (elements.outside + self.config.num_hidden_layers * elements.block)
        return FLOAT32 * self.elements.own

    @property
    def end_of_block(self) -> int:
        """Under zero2 and zero3, a whole block's gradients on the way to the ranks that keep their parts."""
        if self.parallel.shards == 1:
            return 0
        gathered = self.parallel.gather_bytes
        return (gathered + (FLOAT32 if self.is_half else 0)) * self.elements.block + self.head_waiting

    @property
    def embedding(self) -> int:
        """In the embedding's backward pass, the last one: gradients that are there or arrive, and the stream's."""
        elements, is_tied = self.elements, self.config.tie_word_embeddings
        stream = FLOAT32 * self.tokens * self.config.hidden_size
        table, outside = FLOAT32 * elements.table, FLOAT32 * elements.outside
        # A tied head's gradient is there, and the embedding's is added to it.
        arriving = 2 * table if is_tied else table
        shards = self.parallel.shards
        if shards == 1:
            return self.gradients + stream + arriving - (table if self.accumulation == 1 else 0)
        # The last block's gradients are on their way to the ranks that keep their parts.
        there = stream + FLOAT32 * (elements.own - elements.outside // shards + elements.block) + outside
        if self.adds_whole_gradients:
            there += arriving
        else:
            there += arriving - table + (FLOAT32 * elements.outside // shards if self.accumulation > 1 else 0)
        return there - (self.weights - outside)  # of the weights those of the blocks are gone

    def worst(self) -> int:
        """Gradients, activations and what lives beside them at the worst moment."""
        parallel, elements = self.parallel, self.elements
        is_full = parallel.activation_checkpointing == "full"
        first_layer = self.stream if is_full else self.activations // self.config.num_hidden_layers
        in_layer = max(self.activations + self.layer, self.activations - first_layer + self.end_of_block)
        # With tied embeddings the head's gradient waits for the embedding's.
        is_tied = self.config.tie_word_embeddings
        head = FLOAT32 * elements.table
        waiting = head if is_tied and not self.head_waiting else 0
        if self.accumulation > 1:
            in_pass = self.gradients + max(self.activations + self.logits, in_layer + waiting)
            return max(in_pass, self.embedding)
        # The only micro-batch of a step makes gradients while its activations go.
        is_shared = parallel.shards > 1
        missing = 0 if is_shared else FLOAT32 * elements.block + (0 if is_tied else head)
        return max(
            self.activations + self.logits,
            in_layer + (0 if is_shared else head),  # where it is shared out the layer's moment has it
            first_layer + self.layer + self.gradients - missing,
            self.embedding,
        )


def state_memory(config: ModelConfig, parallel: ParallelConfig) -> tuple[int, int, int]:
    """Bytes of a rank's parameters, of their gradients and of the optimizer's moments, all float32."""
    elements = Elements.of(config, parallel)
    return FLOAT32 * elements.own, FLOAT32 * elements.own, FLOAT32 * elements.moments


def step_memory(
    config: ModelConfig, parallel: ParallelConfig, micro_batch: int, block: int, accumulation: int = 2
) -> Memory:
    """What a rank holds at the worst moment of a step, in micro-batches of `micro_batch` x `block` tokens.

    Args:
        accumulation: micro-batches of a step; from the second on, gradients are there already.
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
    """FLOPs of training on so many tokens (`training_flops_per_token`)."""
    return tokens * training_flops_per_token(
        config.num_parameters_without_embeddings,
        config.num_hidden_layers,
        config.num_attention_heads * config.head_dim,
        block,
        config.vocab_size,
        config.hidden_size,
    )
