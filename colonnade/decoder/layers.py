"""The decoder's layers, sharded over the ranks of a tensor-parallel group: attention, feed-forward and whole blocks.

RMSNorm (arXiv:1910.07467), rotary position embeddings (arXiv:2104.09864), grouped-query attention (arXiv:2305.13245)
and SwiGLU (arXiv:2002.05202), with Hugging Face's names for modules and parameters.

Shapes: B batch, T block, H hidden, D head size; n, k heads and i feed-forward channels of one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from colonnade.decoder.attention import DocumentMask, SliceWeights
from colonnade.decoder.key_value_cache import KeyValueCache
from colonnade.decoder.residual import ReplicatedResidual, ShardedResidual
from colonnade.decoder.segments import Segments
from colonnade.decoder.step_weights import StepWeights, join
from colonnade.model_config import ModelConfig
from colonnade.parallel.collectives import TensorGroup, fan_out, fan_out_locally, summed_in_float32, take_part
from colonnade.parallel.pending import Pending
from colonnade.parallel.slices import local_part, pieces


@dataclass(frozen=True)
class ForwardContext:
    """What all layers share while some sequences pass through the model.

    Attributes:
        cos, sin: rotary tables.
        mask: keeps attention within documents; None for causal attention over the whole block.
        cache: keys and values of the preceding tokens; None in training.
        recomputes_mlp: whether the backward pass recomputes the feed-forward's activations instead of saving them.
    """

    residual: ReplicatedResidual | ShardedResidual
    segments: Segments
    cos: Tensor
    sin: Tensor
    mask: DocumentMask | None = None
    cache: KeyValueCache | None = None
    recomputes_mlp: bool = False


class ResidualStream(NamedTuple):
    """The residual stream x of some sequences, and the pending update that is still to be added to it."""

    x: Tensor
    update: Pending[Tensor] | None
    context: ForwardContext


class Projection(nn.Module):
    """Holds the parameters of one projection or norm, so that their names are Hugging Face's."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def local(self) -> list[Tensor]:
        """This rank's part of the weight, and of the bias if there is one."""
        return [local_part(self.weight)] + ([] if self.bias is None else [local_part(self.bias)])


class Sublayer(nn.Module):
    """Attention or feed-forward of one layer: a column-parallel projection in, a row-parallel projection out."""

    group: TensorGroup
    weights: StepWeights

    def partials(self, views: Sequence[Tensor], context: ForwardContext) -> list[Tensor]:
        """The partial output [B, T, H] of each local slice, from its view [B, T, H] of the norm's output."""
        raise NotImplementedError

    def output(self) -> Projection:
        """The row-parallel projection."""
        raise NotImplementedError


class Attention(Sublayer):
    def __init__(
        self,
        make: Callable[..., Projection],
        config: ModelConfig,
        group: TensorGroup,
        weights: StepWeights,
        layer: int,
    ) -> None:
        super().__init__()
        query, key_value = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        bias, hidden = config.attention_bias, config.hidden_size
        self.q_proj = make("q_proj", query, hidden, bias)
        self.k_proj = make("k_proj", key_value, hidden, bias)
        self.v_proj = make("v_proj", key_value, hidden, bias)
        self.o_proj = make("o_proj", hidden, query, config.attention_output_bias)
        self.q_norm = make("q_norm", config.head_dim) if config.qk_norm else None
        self.k_norm = make("k_norm", config.head_dim) if config.qk_norm else None
        self.config, self.group, self.weights = config, group, weights
        self.layer, self.has_rope = layer, config.has_rope(layer)
        adjoin(self.q_proj, self.k_proj, self.v_proj)

    def output(self) -> Projection:
        return self.o_proj

    def partials(self, views: Sequence[Tensor], context: ForwardContext) -> list[Tensor]:
        cos, sin = (context.cos, context.sin) if self.has_rope else (None, None)
        cut = partial(self._slice_weights, views[0].dtype)
        segments, cache = context.segments, context.cache
        if cache is None:
            slices = zip(views, cut(), strict=True)
            return [segments.attention(view, weights, cos, sin, context.mask) for view, weights in slices]
        visible = cache.visible(views[0].shape[1])
        slices = zip(views, cache.once(self, cut), strict=True)
        return [
            segments.cached_attention(view, weights, cos, sin, visible, partial(cache.extend, self.layer, number))
            for number, (view, weights) in enumerate(slices)
        ]

    def _slice_weights(self, dtype: torch.dtype) -> list[SliceWeights]:
        """The attention parameters of each local slice."""
        # Slices that share a key/value head sum its gradients.
        is_shared = self.config.num_key_value_heads < self.group.slices
        joined = self.weights.get((self, "qkv"), self._joined, dtype, is_summed=is_shared)
        outputs = self.weights.get(
            (self, "o"), lambda: pieces(local_part(self.o_proj.weight), self.group.local_slices, 1), dtype
        )
        norms: Sequence[Tensor | None] = [None] * self.group.local_slices
        if self.q_norm is not None:
            norms = self.weights.get((self, "norms"), self._norms, self.q_norm.weight.dtype, is_summed=True)
        count = self.group.local_slices
        biases: Sequence[Tensor | None] = joined[count:] or [None] * count
        return [SliceWeights(*parts) for parts in zip(joined[:count], biases, outputs, norms, strict=True)]

    def _norms(self) -> Sequence[Tensor]:
        # Replicated, but applied to each slice's own heads: f sums both gradients, in one collective.
        assert self.q_norm is not None
        assert self.k_norm is not None
        both = torch.stack((local_part(self.q_norm.weight), local_part(self.k_norm.weight)))
        return fan_out(summed_in_float32(both), self.group)

    def _joined(self) -> list[Tensor]:
        """Per local slice one matrix of queries, keys and values; then, if there are biases, one joined bias each."""
        queries = [pieces(part, self.group.local_slices) for part in self.q_proj.local()]
        keys, values = self._key_value_slices(self.k_proj), self._key_value_slices(self.v_proj)
        return [join(parts) for kind in zip(queries, keys, values, strict=True) for parts in zip(*kind, strict=True)]

    def _key_value_slices(self, projection: Projection) -> list[list[Tensor]]:
        """Each local slice's key (or value) weight, then each one's bias; more slices than heads share heads."""
        heads, group = self.config.num_key_value_heads, self.group
        local = projection.local()
        if heads % group.size:
            # Fewer heads than ranks: the parameter is replicated, and each rank uses one head of it.
            head = group.rank * heads // group.size
            size = self.config.head_dim
            local = [take_part(summed_in_float32(tensor), head * size, size, group) for tensor in local]
        sharing = max(1, group.slices // heads)
        cuts = max(1, group.local_slices // sharing)
        sharing = group.local_slices // cuts
        return [[view for part in pieces(tensor, cuts) for view in fan_out_locally(part, sharing)] for tensor in local]


class MLP(Sublayer):
    def __init__(
        self, make: Callable[..., Projection], config: ModelConfig, group: TensorGroup, weights: StepWeights
    ) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = make("gate_proj", inner, hidden, bias)
        self.up_proj = make("up_proj", inner, hidden, bias)
        self.down_proj = make("down_proj", hidden, inner, bias)
        self.group, self.weights = group, weights
        adjoin(self.gate_proj, self.up_proj)

    def output(self) -> Projection:
        return self.down_proj

    def partials(self, views: Sequence[Tensor], context: ForwardContext) -> list[Tensor]:
        cut = partial(self._slice_weights, views[0].dtype)
        weights = cut() if context.cache is None else context.cache.once(self, cut)
        mlp = context.segments.mlp
        if context.recomputes_mlp:
            mlp = partial(checkpoint, mlp, use_reentrant=False, preserve_rng_state=False)
        return [mlp(view, *slice_) for view, slice_ in zip(views, weights, strict=True)]

    def _slice_weights(self, dtype: torch.dtype) -> list[tuple[Any, ...]]:
        """(gate and up, their bias, down) of each local slice."""
        count = self.group.local_slices
        joined = self.weights.get((self, "gate_up"), self._joined, dtype)
        downs = self.weights.get((self, "down"), lambda: pieces(local_part(self.down_proj.weight), count, 1), dtype)
        biases: Sequence[Tensor | None] = joined[count:] or [None] * count
        return list(zip(joined[:count], biases, downs, strict=True))

    def _joined(self) -> list[Tensor]:
        count = self.group.local_slices
        pairs = zip(self.gate_proj.local(), self.up_proj.local(), strict=True)
        return [join(parts) for gate, up in pairs for parts in zip(pieces(gate, count), pieces(up, count), strict=True)]


def adjoin(*projections: Projection) -> None:
    """Make parameters adjacent in memory, so that their rows form one matrix without a copy."""
    for kind in ("weight", "bias"):
        parameters = [getattr(projection, kind) for projection in projections]
        if parameters[0] is None:
            continue
        parts = [parameter.detach().to_local() for parameter in parameters]
        adjoined = torch.cat(parts).split([len(part) for part in parts])
        for projection, parameter, local in zip(projections, parameters, adjoined, strict=True):
            setattr(projection, kind, _parameter_of(local, parameter))


def _parameter_of(local: Tensor, like: DTensor) -> nn.Parameter:
    """A parameter sharded like `like`, with `local` as this rank's part."""
    mesh, placements = like.device_mesh, like.placements
    whole = DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return nn.Parameter(whole)


class Block(nn.Module):
    """One decoder layer, for one or more streams that are computed in turn."""

    def __init__(
        self,
        make: Callable[..., Projection],
        config: ModelConfig,
        group: TensorGroup,
        weights: StepWeights,
        layer: int,
    ) -> None:
        super().__init__()
        self.input_layernorm = make("input_layernorm", config.hidden_size)
        self.self_attn = Attention(
            lambda name, *sizes: make(f"self_attn.{name}", *sizes), config, group, weights, layer
        )
        self.post_attention_layernorm = make("post_attention_layernorm", config.hidden_size)
        self.mlp = MLP(lambda name, *sizes: make(f"mlp.{name}", *sizes), config, group, weights)
        self.applies_updates = False
        """Whether `forward` adds the pending update before it returns, so that it returns one tensor per stream."""

    def forward(self, streams: Sequence[ResidualStream]) -> list[ResidualStream]:
        streams = _through(streams, self.input_layernorm, self.self_attn)
        streams = _through(streams, self.post_attention_layernorm, self.mlp)
        return [_updated(stream) for stream in streams] if self.applies_updates else streams


def _through(streams: Sequence[ResidualStream], norm: Projection, sublayer: Sublayer) -> list[ResidualStream]:
    """norm -> f -> slices -> g, for each stream; while one stream waits for a collective, the next computes."""
    if streams[0].context.residual.gathers:
        # Start the all-gathers of f for all streams before the first result is needed.
        entered = [_enter(stream, norm) for stream in streams]
        return [_compute(x, views, context, sublayer) for x, views, context in entered]
    return [_compute(*_enter(stream, norm), sublayer) for stream in streams]


def _enter(stream: ResidualStream, norm: Projection) -> tuple[Tensor, Pending[tuple[Tensor, ...]], ForwardContext]:
    x, normed = add_and_norm(stream, norm)
    return x, stream.context.residual.spread(normed), stream.context


def add_and_norm(stream: ResidualStream, norm: Projection) -> tuple[Tensor, Tensor]:
    """The stream with its pending update added, and the norm of that sum."""
    segments, residual = stream.context.segments, stream.context.residual
    if stream.update is None:
        normed: Tensor = residual.apply(segments.norm, (stream.x,), norm.weight)
        return stream.x, normed
    both: tuple[Tensor, Tensor] = residual.apply(segments.residual_norm, (stream.x, stream.update.wait()), norm.weight)
    return both


def _updated(stream: ResidualStream) -> ResidualStream:
    assert stream.update is not None
    return ResidualStream(stream.x + stream.update.wait(), None, stream.context)


def _compute(
    x: Tensor, views: Pending[tuple[Tensor, ...]], context: ForwardContext, sublayer: Sublayer
) -> ResidualStream:
    update = context.residual.collect(sublayer.partials(views.wait(), context))
    bias = sublayer.output().bias
    if bias is None:
        return ResidualStream(x, update, context)
    # A row-parallel projection's bias is added once, after its partial results are summed.
    whole = Pending(finish=lambda: context.residual.apply(_add_bias, (update.wait(),), bias))
    return ResidualStream(x, whole, context)


def _add_bias(x: Tensor, bias: Tensor) -> Tensor:
    return x + bias.to(x.dtype)
