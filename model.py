"""The decoder-only language model, cut over the ranks of a tensor-parallel group.

RMSNorm (arXiv:1910.07467), rotary positions (arXiv:2104.09864), grouped-query attention (arXiv:2305.13245) and SwiGLU
(arXiv:2002.05202): the Llama family, with Hugging Face's names for sizes, modules and parameters.

Shapes: B batch, T block, H hidden, N query heads, K key/value heads, D head size, I feed-forward, V vocabulary; small
letters (n, k, i, v) for what one slice holds. The way of an activation, with the collectives f and g between the
segments (`colonnade/parallel/collectives.py` says what they are):

    ids [B, T] -> vocabulary-parallel embedding -> x [B, T, H]
    each block: x -> norm -> f -> attention slices -> g -> + x -> norm -> f -> MLP slices -> g -> + x
    x -> norm -> f -> logits slices [B * T, v] -> vocabulary-parallel cross-entropy

A segment is what lies between two collectives: plain tensors in, plain tensors out. It is the unit of compilation, so
that no compiled graph holds a collective. Parameters are `DTensor`s; the forward pass takes their local parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from colonnade.model_config import ModelConfig
from colonnade.parallel.attention import DocumentMask, SliceWeights, document_kernel, document_layout
from colonnade.parallel.collectives import (
    TensorGroup,
    fan_out,
    fan_out_locally,
    reduce_partials,
    take_part,
)
from colonnade.parallel.data_parallel import DataParallelShards
from colonnade.parallel.initialization import fill_normal_
from colonnade.parallel.key_value_cache import KeyValueCache
from colonnade.parallel.mesh import ParallelLayout
from colonnade.parallel.rotary import rotary_tables
from colonnade.parallel.segments import Segments
from colonnade.parallel.sharding import VOCABULARY_PARAMETERS, Cut, check_slices, cut_of, piece_count
from colonnade.parallel.slices import cut_slices, fixed_layout, local_part, split_slices
from colonnade.parallel.vocabulary import cross_entropy_sum, embed_tokens

# ------------------------------------------------------------------------------------------------------ modules


class Projection(nn.Module):
    """Holder of one projection's parameters, so that their names are Hugging Face's."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def local(self) -> tuple[Tensor, Tensor | None]:
        """This rank's part of weight and bias."""
        return local_part(self.weight), None if self.bias is None else local_part(self.bias)


class Attention(nn.Module):
    def __init__(self, make: Callable[..., Projection], config: ModelConfig, group: TensorGroup, layer: int) -> None:
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
        self.config, self.group = config, group
        self.layer, self.has_rope = layer, config.has_rope(layer)

    def partials(
        self,
        x: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        segments: Segments,
        mask: DocumentMask | None,
        cache: KeyValueCache | None = None,
    ) -> list[Tensor]:
        """The partial output [B, T, H] of each local slice. With a cache, of tokens that follow those in it."""
        if not self.has_rope:
            cos = sin = None
        views = fan_out(x, self.group)
        if cache is None:
            slices = zip(views, self._slice_weights(x.dtype), strict=True)
            return [segments.attention(view, weights, cos, sin, mask) for view, weights in slices]
        slices = zip(views, cache.once(self, partial(self._slice_weights, x.dtype)), strict=True)
        visible = cache.visible(x.shape[1])
        return [
            segments.cached_attention(view, weights, cos, sin, visible, partial(cache.extend, self.layer, number))
            for number, (view, weights) in enumerate(slices)
        ]

    def _slice_weights(self, dtype: torch.dtype) -> list[SliceWeights]:
        """The parameters of each local slice."""
        queries = split_slices(self.q_proj.local(), self.group, dtype)
        keys, values = self._key_value_slices(self.k_proj, dtype), self._key_value_slices(self.v_proj, dtype)
        outputs = cut_slices(local_part(self.o_proj.weight), self.group, dtype, dim=1)
        norms: Sequence[Tensor | None] = [None] * self.group.local_slices
        if self.q_norm is not None and self.k_norm is not None:
            # Whole on every rank, and used for the heads of each slice: f sums its gradients, both in one collective.
            norms = fan_out(torch.stack((local_part(self.q_norm.weight), local_part(self.k_norm.weight))), self.group)
        return [SliceWeights(*parts) for parts in zip(queries, keys, values, outputs, norms, strict=True)]

    def _key_value_slices(self, projection: Projection, dtype: torch.dtype) -> list[tuple[Tensor, Tensor | None]]:
        """The key (or value) projection of each local slice; slices may share a head when there are more of them."""
        heads, group = self.config.num_key_value_heads, self.group
        weight, bias = projection.local()
        local = [weight] if bias is None else [weight, bias]
        if heads % group.size:
            # Fewer heads than ranks: the parameter is whole everywhere, each rank uses one head of it.
            head = group.rank * heads // group.size
            size = self.config.head_dim
            local = [take_part(tensor, head * size, size, group) for tensor in local]
        sharing = max(1, group.slices // heads)
        cuts = max(1, group.local_slices // sharing)
        sharing = group.local_slices // cuts
        views = [[view for part in tensor.chunk(cuts) for view in fan_out_locally(part, sharing)] for tensor in local]
        # Cast after the fan-out: a shared head's gradients are summed in the parameter's dtype, as they are over ranks.
        slices = [fixed_layout(parts, group, dtype) for parts in views]
        return list(zip(slices[0], slices[1] if bias is not None else [None] * group.local_slices, strict=True))


class MLP(nn.Module):
    def __init__(self, make: Callable[..., Projection], config: ModelConfig, group: TensorGroup) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = make("gate_proj", inner, hidden, bias)
        self.up_proj = make("up_proj", inner, hidden, bias)
        self.down_proj = make("down_proj", hidden, inner, bias)
        self.group = group

    def partials(self, x: Tensor, segments: Segments, cache: KeyValueCache | None = None) -> list[Tensor]:
        """The partial output [B, T, H] of each local slice. With a cache, the slices are cut once for all tokens."""
        weights = (
            self._slice_weights(x.dtype) if cache is None else cache.once(self, lambda: self._slice_weights(x.dtype))
        )
        return [segments.mlp(view, *slice_) for view, slice_ in zip(fan_out(x, self.group), weights, strict=True)]

    def _slice_weights(self, dtype: torch.dtype) -> list[tuple[Any, ...]]:
        """(gate, up, down) of each local slice."""
        gates, ups = (split_slices(part.local(), self.group, dtype) for part in (self.gate_proj, self.up_proj))
        downs = cut_slices(local_part(self.down_proj.weight), self.group, dtype, dim=1)
        return list(zip(gates, ups, downs, strict=True))


class Block(nn.Module):
    """One decoder layer: x [B, T, H] -> x [B, T, H], whole on every rank."""

    def __init__(self, make: Callable[..., Projection], config: ModelConfig, group: TensorGroup, layer: int) -> None:
        super().__init__()
        self.input_layernorm = make("input_layernorm", config.hidden_size)
        self.self_attn = Attention(lambda name, *sizes: make(f"self_attn.{name}", *sizes), config, group, layer)
        self.post_attention_layernorm = make("post_attention_layernorm", config.hidden_size)
        self.mlp = MLP(lambda name, *sizes: make(f"mlp.{name}", *sizes), config, group)
        self.group = group

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        segments: Segments,
        mask: DocumentMask | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        normed = segments.norm(x, local_part(self.input_layernorm.weight))
        partials = self.self_attn.partials(normed, cos, sin, segments, mask, cache)
        update = with_bias(reduce_partials(partials, self.group), self.self_attn.o_proj)
        x, normed = segments.residual_norm(x, update, local_part(self.post_attention_layernorm.weight))
        partials = self.mlp.partials(normed, segments, cache)
        return x + with_bias(reduce_partials(partials, self.group), self.mlp.down_proj)


def with_bias(x: Tensor, projection: Projection) -> Tensor:
    """Add a row-parallel projection's bias: once, after its partial results are summed."""
    return x if projection.bias is None else x + local_part(projection.bias).to(x.dtype)


class Decoder(nn.Module):
    """Embedding, blocks and last norm; named so that parameters read `model.layers.0...`."""

    def __init__(self, make: Callable[..., Projection], config: ModelConfig, group: TensorGroup) -> None:
        super().__init__()
        self.embed_tokens = make("model.embed_tokens", config.padded_vocab_size, config.hidden_size, False)
        self.layers = nn.ModuleList(
            Block(partial(_prefixed, make, f"model.layers.{index}"), config, group, index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = make("model.norm", config.hidden_size)


def _prefixed(make: Callable[..., Projection], prefix: str, name: str, *sizes: Any) -> Projection:
    return make(f"{prefix}.{name}", *sizes)


# ------------------------------------------------------------------------------------------------ the whole model


class TensorParallelModel(nn.Module):
    """A decoder whose parameters are cut over the "tp" dimension of a mesh.

    The same seed gives the same weights, to the bit, at every tensor- and data-parallel size. Initialisation: weights
    N(0, initializer_range), those of the projections into the residual stream (o_proj, down_proj) divided by
    sqrt(2 * layers) (GPT-2, section 2.3), norms 1, biases 0.

    Args:
        config: the sizes.
        layout: mesh and device.
        seed: keys the initial weights.
        slices: V, the number of slices with a fixed order of sums; None for one a rank, summed by the library.
        replicate_embeddings: keep embedding and head whole on every rank.
        param_dtype: what parameters (and gradients, and optimizer state) are stored in.
        compute_dtype: what activations and matrix products use; None for the parameters' dtype.
        gradient_checkpointing: keep only each block's input and compute the rest again in the backward pass.
        compiled: compile the segments between collectives.

    Raises:
        UsageError: the sizes cannot be cut over these ranks.
    """

    def __init__(
        self,
        config: ModelConfig,
        layout: ParallelLayout,
        *,
        seed: int = 0,
        slices: int | None = None,
        replicate_embeddings: bool = False,
        param_dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        gradient_checkpointing: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        check_slices(config, layout.tp, slices)
        self.config, self.layout = config, layout
        self.group = TensorGroup(layout.tp_group, slices)
        self.replicate_embeddings = replicate_embeddings
        self.compute_dtype = compute_dtype or param_dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.segments = Segments(config, compiled=compiled)
        # For shapes that change with every call, as those of generation do.
        self.eager_segments = Segments(config, compiled=False)
        self.document_kernel = document_kernel(layout.device, config.head_dim, self.compute_dtype, compiled=compiled)
        make = partial(self._make, seed, param_dtype)
        self.model = Decoder(make, config, self.group)
        self.lm_head = (
            None if config.tie_word_embeddings else make("lm_head", config.padded_vocab_size, config.hidden_size, False)
        )
        self._rotary: tuple[Tensor, Tensor] | None = None
        self.shards: DataParallelShards | None = None
        """How data-parallel ranks share out the parameters (`shard_over_data_parallel`); None: each has all."""

    # -- creation

    def _make(
        self,
        seed: int,
        dtype: torch.dtype,
        name: str,
        out_features: int,
        in_features: int | None = None,
        bias: bool = False,
    ) -> Projection:
        """Create and initialise the parameters of one projection, or of a norm when it has no input size."""
        if in_features is None:
            return Projection(self._parameter(f"{name}.weight", (out_features,), dtype, seed, fill=1.0))
        weight = self._parameter(f"{name}.weight", (out_features, in_features), dtype, seed)
        return Projection(weight, self._parameter(f"{name}.bias", (out_features,), dtype, seed, 0.0) if bias else None)

    def _parameter(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int, fill: float | None = None
    ) -> nn.Parameter:
        mesh, size = self.layout.tp_mesh, torch.Size(shape)
        cut = self.cut(name)
        local_shape, offsets = compute_local_shape_and_global_offset(size, mesh, [cut.placement])
        local = torch.empty(local_shape, dtype=dtype, device=self.layout.device)
        if fill is not None:
            local.fill_(fill)
        else:
            std = self.config.initializer_range
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            fill_normal_(local, name=name, shape=size, dim=cut.dim, offset=offsets[cut.dim], seed=seed, std=std)
            if name.endswith(VOCABULARY_PARAMETERS):
                local[max(0, self.config.vocab_size - offsets[0]) :].zero_()
        strides = (shape[1], 1) if len(shape) == 2 else (1,)
        return nn.Parameter(
            DTensor.from_local(local, mesh, [cut.placement], run_check=False, shape=size, stride=strides)
        )

    def cut(self, name: str) -> Cut:
        """How the parameter `name` lies over the tensor-parallel ranks."""
        return cut_of(name, self.config, self.layout.tp, replicate_embeddings=self.replicate_embeddings)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """Of each parameter the dimension it is cut along, and the pieces that no rank count cuts further."""
        slices = self.group.slices
        return [(self.cut(name).dim, piece_count(name, self.config, slices)) for name, _ in self.named_parameters()]

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Parameters of the whole model, padding left out; without embedding and head on request."""
        count = 0
        for name, parameter in self.named_parameters():
            if name.endswith(VOCABULARY_PARAMETERS):
                count += self.config.vocab_size * self.config.hidden_size if embeddings else 0
            else:
                count += parameter.numel()
        return count

    # -- forward

    def forward(self, input_ids: Tensor, labels: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """Sum of the tokens' cross-entropies.

        Args:
            input_ids: [B, T] token ids.
            labels: [B, T], the next token of each position; `IGNORE_INDEX` leaves one out.
            document_starts: bool [B, T], True where a document begins (the first column counts as True): attention
                stays within a document and positions restart with it. None: each row is one document.

        Returns:
            A scalar, float32 or wider, equal on every rank of the group.
        """
        hidden = self._hidden(input_ids, document_starts)
        labels = labels.reshape(-1)
        weight, start = self._head()
        vocab_size = self.config.vocab_size
        if self.replicate_embeddings:
            logits = self.segments.logits(hidden, weight)[:, :vocab_size]
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return F.cross_entropy(wide, labels, reduction="sum")
        slices = cut_slices(weight, self.group, hidden.dtype)
        starts = [start]
        for part in slices[:-1]:
            starts.append(starts[-1] + part.shape[0])
        logits = [
            self.segments.logits(view, part) for view, part in zip(fan_out(hidden, self.group), slices, strict=True)
        ]
        return cross_entropy_sum(logits, labels, starts, vocab_size, self.group)

    @torch.no_grad()
    def logits(self, input_ids: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of the whole vocabulary on every rank, for checks; not for training."""
        return self._whole_logits(self._hidden(input_ids, document_starts))

    @torch.no_grad()
    def next_logits(self, input_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits [B, V] of the token after each row, whole on every rank; the cache then holds these tokens as well.

        Args:
            input_ids: [B, T] token ids, which follow those in the cache; [B, 1] after the first call.
            cache: for these rows, with room for T tokens.
        """
        x = self._embedded(input_ids)
        count = input_ids.shape[1]
        cos, sin = (
            table[cache.positions(count)].unsqueeze(1).to(x.dtype) for table in self._rotary_tables(cache.places)
        )
        for layer in self.model.layers:
            x = layer(x, cos, sin, self.eager_segments, None, cache)
        cache.advance(count)
        hidden = self.eager_segments.norm(x[:, -1:], local_part(self.model.norm.weight))
        return self._whole_logits(hidden)[:, 0]

    def _whole_logits(self, hidden: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, V] on every rank, each slice's product on its own where the order of sums is fixed."""
        weight, _ = self._head()
        slices = [weight] if self.replicate_embeddings else cut_slices(weight, self.group, hidden.dtype)
        local = torch.cat([self.eager_segments.logits(hidden, part) for part in slices], dim=1)
        if self.group.size > 1 and not self.replicate_embeddings:
            # Shards may be uneven; each rank announces its own width by the same rule.
            widths = [part.shape[0] for part in torch.empty(self.config.padded_vocab_size).chunk(self.group.size)]
            parts = [local.new_empty(local.shape[0], width) for width in widths]
            dist.all_gather(parts, local, group=self.group.group)
            local = torch.cat(parts, dim=1)
        return local[:, : self.config.vocab_size].view(*hidden.shape[:2], -1)

    def _embedded(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, T] -> [B, T, H] in the dtype of the products."""
        table = local_part(self.model.embed_tokens.weight)
        if self.replicate_embeddings:
            x = F.embedding(input_ids, table)
        else:
            x = embed_tokens(input_ids, table, self._vocabulary_start(self.model.embed_tokens.weight), self.group)
        return x.to(self.compute_dtype)

    def _hidden(self, input_ids: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """The last norm's output [B, T, H] for token ids [B, T]."""
        x = self._embedded(input_ids)
        cos, sin = self._rotary_tables(input_ids.shape[1])
        mask = None
        if document_starts is not None:
            # Once for all layers: the mask, and the tables of each row in the dtype that attention saves them in.
            layout = document_layout(document_starts, self.document_kernel)
            mask = layout.mask
            cos, sin = (table[layout.positions].unsqueeze(1).to(x.dtype) for table in (cos, sin))
        for layer in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, self.segments, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, cos, sin, self.segments, mask)
        return self.segments.norm(x, local_part(self.model.norm.weight))

    def _head(self) -> tuple[Tensor, int]:
        """This rank's rows of the output matrix, and the id of the first."""
        parameter = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight
        return local_part(parameter), self._vocabulary_start(parameter)

    def _vocabulary_start(self, parameter: nn.Parameter) -> int:
        assert isinstance(parameter, DTensor)
        _, offsets = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
        return offsets[0]

    def _rotary_tables(self, block: int) -> tuple[Tensor, Tensor]:
        """cos and sin [T, D] for positions 0..T-1."""
        if self._rotary is None or self._rotary[0].shape[0] < block:
            self._rotary = rotary_tables(self.config, block, self.layout.device)
        return self._rotary[0][:block], self._rotary[1][:block]

    def whole_shapes(self) -> dict[str, torch.Size]:
        """The shape of each whole parameter by name, the vocabulary without padding."""
        return {
            name: torch.Size((self._rows(name, parameter), *parameter.shape[1:]))
            for name, parameter in self.named_parameters()
        }

    def whole_parameter(self, name: str) -> Tensor:
        """The whole value of a parameter, the vocabulary without padding. Collective."""
        parameter = self.get_parameter(name)
        value = parameter.detach()
        assert isinstance(value, DTensor)
        return value.full_tensor()[: self._rows(name, parameter)]

    def _rows(self, name: str, parameter: nn.Parameter) -> int:
        return self.config.vocab_size if name.endswith(VOCABULARY_PARAMETERS) else parameter.shape[0]

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole value of each parameter, one at a time. Collective."""
        for name, _ in self.named_parameters():
            yield name, self.whole_parameter(name)
