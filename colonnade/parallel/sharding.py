"""How each parameter is sharded: one table, used by all code that creates, loads, merges or exports a parameter.

Names are Hugging Face's; a rule applies to the last two parts of a name (`q_proj.weight`). Weights are stored as
[out_features, in_features], so a column-parallel projection is cut along dimension 0 and a row-parallel one along 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from colonnade.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

COLUMN = "column"  # [out / tp, in]: its input goes through f
ROW = "row"  # [out, in / tp]: its output is partial and goes through g
KEY_VALUE = "key/value"  # column if every rank gets whole key/value heads, otherwise replicated
VOCABULARY = "vocabulary"  # [vocab / tp, hidden], or replicated with --replicate-embeddings
WHOLE = "whole"  # replicated

SHARDING_TABLE: dict[str, str] = {
    "embed_tokens.weight": VOCABULARY,
    "input_layernorm.weight": WHOLE,
    "q_proj.weight": COLUMN,
    "q_proj.bias": COLUMN,
    "k_proj.weight": KEY_VALUE,
    "k_proj.bias": KEY_VALUE,
    "v_proj.weight": KEY_VALUE,
    "v_proj.bias": KEY_VALUE,
    "q_norm.weight": WHOLE,  # each rank applies it to its own heads only: its gradient is summed
    "k_norm.weight": WHOLE,
    "o_proj.weight": ROW,
    "o_proj.bias": WHOLE,  # added once, after g
    "post_attention_layernorm.weight": WHOLE,
    "gate_proj.weight": COLUMN,
    "gate_proj.bias": COLUMN,
    "up_proj.weight": COLUMN,
    "up_proj.bias": COLUMN,
    "down_proj.weight": ROW,
    "down_proj.bias": WHOLE,
    "norm.weight": WHOLE,
    "lm_head.weight": VOCABULARY,
}


class ShardedSizes(Protocol):
    """The sizes of a model that determine how it can be sharded (`ModelConfig` has them)."""

    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def padded_vocab_size(self) -> int: ...


@dataclass(frozen=True)
class Cut:
    """How one parameter is laid out over the ranks of a tensor-parallel group.

    Attributes:
        dim: the dimension along which it is initialised and sharded, even if it is replicated at this size.
        sharded: whether each rank holds a shard; otherwise every rank holds all of it.
    """

    dim: int
    sharded: bool

    @property
    def placement(self) -> Placement:
        from torch.distributed.tensor import Replicate, Shard

        return Shard(self.dim) if self.sharded else Replicate()


def cut_of(name: str, sizes: ShardedSizes, tp: int, *, replicate_embeddings: bool = False) -> Cut:
    """How the parameter `name` is sharded over `tp` ranks.

    Raises:
        KeyError: the table has no rule for the name.
    """
    rule = SHARDING_TABLE[".".join(name.split(".")[-2:])]
    if rule == KEY_VALUE:
        return Cut(dim=0, sharded=sizes.num_key_value_heads % tp == 0)
    if rule == VOCABULARY:
        return Cut(dim=0, sharded=not replicate_embeddings)
    return Cut(dim=1 if rule == ROW else 0, sharded=rule != WHOLE)


def is_vocabulary(name: str) -> bool:
    """Whether each row of the parameter `name` belongs to a token."""
    return SHARDING_TABLE.get(".".join(name.split(".")[-2:])) == VOCABULARY


def piece_count(name: str, sizes: ShardedSizes, slices: int) -> int:
    """Number of equal pieces of the parameter `name` that no tensor-parallel size dividing `slices` cuts further."""
    rule = SHARDING_TABLE[".".join(name.split(".")[-2:])]
    if rule == KEY_VALUE:
        return min(slices, sizes.num_key_value_heads)
    return 1 if rule == WHOLE else slices


def default_slices(sizes: ShardedSizes) -> int:
    """Default V of a deterministic run: 8, or the largest smaller power of two into which the model can be cut."""
    return max(slice_counts(sizes, (1, 2, 4, 8)))


def slice_counts(sizes: ShardedSizes, candidates: Iterable[int]) -> list[int]:
    """Those of `candidates` into which a model of these sizes can be cut."""
    return [count for count in candidates if _obstacle(sizes, count) is None]


def check_slices(sizes: ShardedSizes, tp: int, slices: int | None) -> None:
    """Reject a cut that the model's sizes do not allow, before anything is built.

    Args:
        tp: size of a tensor-parallel group.
        slices: V, if it was requested; None for one slice per rank.

    Raises:
        UsageError: the model cannot be cut this way; the message names both numbers and the sizes that would work.
    """
    if slices is not None:
        if slices & (slices - 1):
            raise UsageError(
                f"--tensor-slices {slices} is not a power of two, which a binary tree of sums needs; give 1, 2, 4, 8"
            )
        if slices % tp:
            raise UsageError(
                f"--tensor-slices {slices} cannot be shared out over {tp} tensor-parallel ranks; "
                f"use a multiple of {tp}, or a tensor-parallel size that divides {slices}"
            )
    count, flag = (tp, "--tensor-parallel-size") if slices is None else (slices, "--tensor-slices")
    obstacle = _obstacle(sizes, count)
    if obstacle:
        workable = slice_counts(sizes, range(1, sizes.num_attention_heads + 1))
        if slices is not None:
            workable = [size for size in workable if size & (size - 1) == 0]
        raise UsageError(f"{flag} {count}: {obstacle}; sizes that work: {', '.join(map(str, workable))}")


def _obstacle(sizes: ShardedSizes, count: int) -> str | None:
    """Why the model cannot be cut into `count` equal slices; None if it can."""
    key_value_heads = sizes.num_key_value_heads
    if sizes.num_attention_heads % count:
        return f"{sizes.num_attention_heads} attention heads cannot be cut into {count}"
    if sizes.intermediate_size % count:
        return f"a feed-forward of {sizes.intermediate_size} cannot be cut into {count}"
    if key_value_heads % count and count % key_value_heads:
        return f"{key_value_heads} key/value heads are neither a multiple nor a divisor of {count}"
    if sizes.padded_vocab_size % count and count & (count - 1) == 0:
        return f"a padded vocabulary of {sizes.padded_vocab_size} cannot be cut into {count}"
    return None
