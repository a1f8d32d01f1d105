"""What a run costs, computed from sizes alone: bytes a rank by kind, FLOPs and time.

The memory is that of the tensors, at the moment of a step when most of them live. What allocators, communication
libraries and kernels take besides is not in it. Activations are those that eager autograd keeps for the backward pass
(`model.py`, `colonnade/parallel/vocabulary.py`); compiled segments keep fewer. `tests/test_cost_model.py` compares with
the bytes that torch allocates on the CPU.

Letters: M tokens of a micro-batch (B x T); H hidden; n, k heads of queries and of keys on a rank; D head size; i
feed-forward channels and v vocabulary entries of a rank; e bytes of an activation, 2 or 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from colonnade.model_config import ModelConfig, layer_shapes, outer_shapes
from colonnade.parallel.sharding import cut_of, is_vocabulary
from colonnade.tuning.flops import training_flops_per_token

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
FLOAT32 = 4


@dataclass(frozen=True)
class Placement:
    """What decides what a rank holds.

    Attributes:
        tp: tensor-parallel ranks.
        precision: of activations and matrix products: fp32, bf16 or fp16.
        optimizer: adamw or muon.
        repeats_heads: whether attention copies each key/value head for its queries, as it does on the CPU.
    """

    tp: int = 1
    precision: str = "bf16"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = True
    replicate_embeddings: bool = False
    repeats_heads: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by kind.

    Attributes:
        parameters, gradients: float32.
        moments: of the optimizer, float32: two of AdamW, one of Muon.
        activations: what the forward pass keeps for the backward pass, and copies of weights in the dtype of products.
        peak: what lives besides at the worst moment: logits and their exponentials, or a layer that is computed again
            and the gradients inside of it.
    """

    parameters: int
    gradients: int
    moments: int
    activations: int
    peak: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def local_numel(config: ModelConfig, placement: Placement) -> Iterator[tuple[str, int, int]]:
    """Of each kind of parameter its name, the elements a rank holds of one, and how many of them there are."""
    repeats = [(name, shape, 1) for name, shape in outer_shapes(config).items()]
    repeats += [(name, shape, config.num_hidden_layers) for name, shape in layer_shapes(config).items()]
    for name, shape, count in repeats:
        rows = config.padded_vocab_size if is_vocabulary(name) else shape[0]
        sizes = [rows, *shape[1:]]
        cut = cut_of(name, config, placement.tp, replicate_embeddings=placement.replicate_embeddings)
        if cut.sharded:
            sizes[cut.dim] = -(-sizes[cut.dim] // placement.tp)
        yield name, math.prod(sizes), count


def state_memory(config: ModelConfig, placement: Placement) -> Memory:
    """What a rank holds between two steps, and the gradients: nothing of it depends on the batch."""
    elements = moments = 0
    for name, numel, count in local_numel(config, placement):
        elements += numel * count
        is_matrix = name.endswith("_proj.weight")
        moments += numel * count * (1 if placement.optimizer == "muon" and is_matrix else 2)
    return Memory(FLOAT32 * elements, FLOAT32 * elements, FLOAT32 * moments, 0, 0)


def step_memory(config: ModelConfig, placement: Placement, micro_batch: int, block: int) -> Memory:
    """What a rank holds at the worst moment of a step, in micro-batches of `micro_batch` x `block` tokens."""
    state, sizes = state_memory(config, placement), _LayerSizes.of(config, placement)
    tokens, layers = micro_batch * block, config.num_hidden_layers
    e, hidden = BYTES[placement.precision], config.hidden_size
    layer = tokens * sizes.kept_a_token() + sizes.weight_copies
    logits = tokens * sizes.logits_a_token()
    inside = tokens * sizes.gradients_a_token() + sizes.weight_gradient
    head = tokens * sizes.norm_a_token() + sizes.head_copy
    if placement.gradient_checkpointing:
        # A layer keeps its input; one at a time is computed again, when the logits are gone.
        activations = layers * tokens * e * hidden
        shared = tokens * e * hidden if e == FLOAT32 else 0  # the input is what its norm keeps
        return _with(state, activations, max(head + logits, layer - shared + inside))
    return _with(state, layers * layer + head, max(logits, inside))


def _with(state: Memory, activations: int, peak: int) -> Memory:
    return Memory(state.parameters, state.gradients, state.moments, activations, peak)


@dataclass(frozen=True)
class _LayerSizes:
    """Widths of what one rank computes of a layer, and of the head."""

    hidden: int
    query: int
    key_value: int
    inner: int
    vocabulary: int
    heads: int
    e: int
    weight_copies: int
    head_copy: int
    weight_gradient: int

    @classmethod
    def of(cls, config: ModelConfig, placement: Placement) -> _LayerSizes:
        tp, e = placement.tp, BYTES[placement.precision]
        heads, key_heads = config.num_attention_heads // tp, max(1, config.num_key_value_heads // tp)
        # Products in another dtype than the parameters' save the copies of weights that they were given.
        is_copied = e != FLOAT32
        numel = {name: numel for name, numel, _ in local_numel(config, placement)}
        copies = sum(count for name, count in numel.items() if name.endswith("_proj.weight"))
        table = numel.get("lm_head.weight", numel["model.embed_tokens.weight"])
        return cls(
            hidden=config.hidden_size,
            query=heads * config.head_dim,
            key_value=(heads if placement.repeats_heads else key_heads) * config.head_dim,
            inner=config.intermediate_size // tp,
            vocabulary=table // config.hidden_size,
            heads=heads,
            e=e,
            weight_copies=is_copied * e * copies,
            head_copy=is_copied * e * table,
            # A product's own gradient of its weight, before it is added in float32 to what is there.
            weight_gradient=(e * is_copied + FLOAT32) * numel["mlp.up_proj.weight"],
        )

    def norm_a_token(self) -> int:
        """A norm keeps its input in float32, the normalised one before its weight and after it."""
        return self.hidden * (FLOAT32 + 2 * self.e) + FLOAT32

    def kept_a_token(self) -> int:
        """Two norms; of attention query, key, value, result, sums of exponentials; gate, its SiLU, up, the product."""
        attention = self.e * (2 * self.query + 2 * self.key_value) + FLOAT32 * self.heads
        return 2 * self.norm_a_token() + attention + 4 * self.e * self.inner

    def logits_a_token(self) -> int:
        """Logits, their exponentials in float32, and where the dtypes differ the logits in float32."""
        return self.vocabulary * (self.e + FLOAT32 + (FLOAT32 if self.e != FLOAT32 else 0))

    def gradients_a_token(self) -> int:
        """In the feed-forward's backward pass, its product being gone: gradients of up, gate and the residual."""
        return self.e * (2 * self.inner + 2 * self.hidden)


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
