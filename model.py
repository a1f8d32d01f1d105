"""The decoder-only language model, sharded over the ranks of a tensor-parallel group.

RMSNorm (arXiv:1910.07467), rotary position embeddings (arXiv:2104.09864), grouped-query attention (arXiv:2305.13245)
and SwiGLU (arXiv:2002.05202): the Llama family, with Hugging Face's names for sizes, modules and parameters.

Shapes: B batch, T block, H hidden, N query heads, K key/value heads, D head size, I feed-forward, V vocabulary;
lower-case letters (n, k, i, v) are the sizes of one slice. The forward pass, with the collectives f and g between the
segments (`colonnade/parallel/collectives.py` defines them):

    ids [B, T] -> vocabulary-parallel embedding -> x [B, T, H]
    each block: x -> norm -> f -> attention slices -> g -> + x -> norm -> f -> MLP slices -> g -> + x
    x -> norm -> f -> head and cross-entropy slices, one chunk of tokens at a time

A segment is the computation between two collectives: plain tensors in, plain tensors out. It is compiled as a whole or
without its first projection (`colonnade/decoder/segments.py`), so no compiled graph contains a collective. Parameters
are `DTensor`s; the forward pass uses their local parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from colonnade.decoder.attention import document_kernel, document_layout, takes_groups
from colonnade.decoder.column_parallel import can_hide_sums
from colonnade.decoder.float8 import float8_linear
from colonnade.decoder.initialization import fill_normal_
from colonnade.decoder.key_value_cache import KeyValueCache
from colonnade.decoder.layers import Block, ForwardContext, Projection, ResidualStream, add_and_norm
from colonnade.decoder.residual import ReplicatedResidual, ShardedResidual
from colonnade.decoder.rotary import rotary_tables
from colonnade.decoder.segments import Segments
from colonnade.decoder.step_weights import StepWeights
from colonnade.model_config import ModelConfig
from colonnade.parallel.collectives import TensorGroup
from colonnade.parallel.data_parallel import DataParallelShards, shard_over_data_parallel
from colonnade.parallel.head_loss import LossOptions, head_loss
from colonnade.parallel.mesh import ParallelLayout
from colonnade.parallel.pending import Pending
from colonnade.parallel.sharding import Cut, check_slices, cut_of, is_vocabulary, piece_count
from colonnade.parallel.shared_memory import SharedMemory
from colonnade.parallel.slices import local_part, pieces
from colonnade.parallel.vocabulary import embed_tokens
from colonnade.run_settings import CHECKPOINTING


class Decoder(nn.Module):
    """Embedding, blocks and final norm: a separate module, so that parameter names read `model.layers.0...`."""

    def __init__(
        self, make: Callable[..., Projection], config: ModelConfig, group: TensorGroup, weights: StepWeights
    ) -> None:
        super().__init__()
        self.embed_tokens = make("model.embed_tokens", config.padded_vocab_size, config.hidden_size, False)
        self.layers = nn.ModuleList(
            Block(partial(_prefixed, make, f"model.layers.{index}"), config, group, weights, index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = make("model.norm", config.hidden_size)


def _prefixed(make: Callable[..., Projection], prefix: str, name: str, *sizes: Any) -> Projection:
    return make(f"{prefix}.{name}", *sizes)


# ------------------------------------------------------------------------------------------------ the whole model


class TensorParallelModel(nn.Module):
    """A decoder whose parameters are sharded over the "tp" dimension of a mesh.

    The same seed gives the same weights, to the bit, at every tensor- and data-parallel size. Initialisation: weights
    are normal with mean 0 and standard deviation initializer_range, which is divided by sqrt(2 * layers) for the
    projections into the residual stream (o_proj, down_proj; GPT-2, section 2.3); norms are 1, biases 0.

    Args:
        config: the model's sizes.
        layout: mesh and device.
        seed: seeds the initial weights.
        slices: V, the number of slices, which are summed in a fixed order; None for one slice per rank, summed by the
            library's all-reduce.
        replicate_embeddings: keep embedding and head whole on every rank.
        param_dtype: the dtype in which parameters (and gradients, and optimizer state) are stored.
        compute_dtype: the dtype of activations and matrix products; None for the parameters' dtype.
        activation_checkpointing: what the backward pass recomputes: "none", "selective" (the feed-forward, which needs
            no collective) or "full" (whole blocks, of which only the input is kept).
        compiled: compile the segments between collectives.
        sequence_parallel: shard the tokens of the residual stream over the ranks.
        overlap_collectives: compute one half of a micro-batch while a collective of the other half is in flight.
        cuda_graphs: replay the compiled segments as CUDA graphs.
        float8: compute the projections' matrix products in float8 (`colonnade/decoder/float8.py`).
        z_loss: coefficient of the z-loss, the squared logarithm of the softmax's denominator; 0 disables it.
        shares_memory: on the CPU, ranks of one machine exchange tensors through shared memory (`SharedMemory`).
        overlap_weight_gradients: in the backward pass, compute weight gradients while the all-reduce of the input
            gradient (f) is in flight (`colonnade/decoder/column_parallel.py`). Has no effect with one rank,
            `cuda_graphs` or `float8`, or when compiled with a fixed order of sums.

    Raises:
        UsageError: the sizes cannot be sharded over these ranks.
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
        activation_checkpointing: str = "none",
        compiled: bool = False,
        sequence_parallel: bool = False,
        overlap_collectives: bool = False,
        cuda_graphs: bool = False,
        float8: bool = False,
        z_loss: float = 0.0,
        shares_memory: bool = True,
        overlap_weight_gradients: bool = True,
    ) -> None:
        super().__init__()
        check_slices(config, layout.tp, slices)
        assert activation_checkpointing in CHECKPOINTING
        self.config, self.layout = config, layout
        memory = SharedMemory(layout.tp_group) if shares_memory and layout.device.type == "cpu" else None
        self.group = TensorGroup(layout.tp_group, slices, memory=memory)
        self.replicate_embeddings = replicate_embeddings
        self.compute_dtype = compute_dtype or param_dtype
        self.activation_checkpointing = activation_checkpointing
        self.sequence_parallel, self.overlap_collectives = sequence_parallel, overlap_collectives
        self.z_loss = z_loss
        self.cuda_graphs = cuda_graphs
        self.weights = StepWeights(fixed_order=self.group.fixed_order, at_fixed_addresses=cuda_graphs)
        product = float8_linear(layout.device) if float8 else None
        grouped = takes_groups(layout.device, self.compute_dtype)
        self.segments = Segments(
            config,
            compiled=compiled,
            cuda_graphs=cuda_graphs,
            grouped=grouped,
            product=product,
            overlap_weight_gradients=overlap_weight_gradients
            and self.group.size > 1
            and can_hide_sums(
                compiled=compiled, fixed_order=self.group.fixed_order, cuda_graphs=cuda_graphs, float8=float8
            ),
        )
        # For generation, whose shapes change with every call: each shape would be compiled again.
        self.eager_segments = Segments(config, compiled=False, grouped=grouped, product=product)
        self.document_kernel = document_kernel(layout.device, config.head_dim, self.compute_dtype, compiled=compiled)
        make = partial(self._make, seed, param_dtype)
        self.model = Decoder(make, config, self.group, self.weights)
        if activation_checkpointing == "full":
            self._settle_blocks()
        self.lm_head = (
            None if config.tie_word_embeddings else make("lm_head", config.padded_vocab_size, config.hidden_size, False)
        )
        if cuda_graphs:
            for parameter in self.parameters():
                # The next replay of a graph overwrites its output memory, so gradients that are kept must be copies.
                parameter.register_hook(torch.clone)
        self._rotary: tuple[Tensor, Tensor] | None = None
        self.shards: DataParallelShards | None = None
        """How data-parallel ranks shard the parameters (`shard_over_data_parallel`); None if they do not."""

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
        """Create and initialise the parameters of one projection, or of a norm if `in_features` is None."""
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
            if is_vocabulary(name):
                local[max(0, self.config.vocab_size - offsets[0]) :].zero_()
        strides = (shape[1], 1) if len(shape) == 2 else (1,)
        return nn.Parameter(
            DTensor.from_local(local, mesh, [cut.placement], run_check=False, shape=size, stride=strides)
        )

    def share_out(self, *, mode: str, fixed_order: bool, gather_dtype: torch.dtype | None = None) -> None:
        """Shard the parameters over the layout's data-parallel ranks as well (`shard_over_data_parallel`)."""
        self._settle_blocks()
        self.shards = shard_over_data_parallel(
            self,
            self.model.layers,
            self.layout,
            self.group,
            mode=mode,
            fixed_order=fixed_order,
            gather_dtype=gather_dtype,
            evaluations=("logits", "next_logits"),
        )

    def cut(self, name: str) -> Cut:
        """How the parameter `name` is cut over the tensor-parallel ranks."""
        return cut_of(name, self.config, self.layout.tp, replicate_embeddings=self.replicate_embeddings)

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """For each parameter, its cut dimension and its number of pieces, which no number of ranks cuts further."""
        slices = self.group.slices
        return [(self.cut(name).dim, piece_count(name, self.config, slices)) for name, _ in self.named_parameters()]

    def num_parameters(self, *, embeddings: bool = True) -> int:
        """Number of parameters of the whole model, without padding; excludes embedding and head if not `embeddings`."""
        count = 0
        for name, parameter in self.named_parameters():
            if is_vocabulary(name):
                count += self.config.vocab_size * self.config.hidden_size if embeddings else 0
            else:
                count += parameter.numel()
        return count

    # -- forward

    def weights_kept(self) -> AbstractContextManager[None]:
        """Context in which weights are cast and joined once for all passes; on exit their gradients are in `.grad`.

        A no-op if data-parallel ranks shard the parameters: FSDP then gathers and frees the whole ones itself.
        """
        return self.weights.kept() if self.shards is None else nullcontext()

    def gradient_holders(self) -> list[Tensor]:
        """The tensors with the gradients of the passes so far: parameters and, in `weights_kept`, their copies."""
        return [*self.parameters(), *self.weights.leaves()]

    def forward(
        self, input_ids: Tensor, labels: Tensor, document_starts: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        """Sum of the tokens' cross-entropies, plus their z-losses if gradients are enabled.

        Args:
            input_ids: [B, T] token ids.
            labels: [B, T], the next token of each position; `IGNORE_INDEX` excludes a position.
            document_starts: bool [B, T], True where a document begins (the first column counts as True): attention
                stays within a document, and positions restart at its beginning. None: each row is one document.
            scale: factor applied to the sum.

        Returns:
            A scalar, float32 or wider, equal on every rank of the tensor-parallel group.
        """
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        table = local_part(self.model.embed_tokens.weight)
        ends = self._final_hidden_states(input_ids, document_starts, table)
        weight, start = self._head(table)
        weights = pieces(weight, self._head_slices)
        products = self.weights.get("head", lambda: [part.detach() for part in weights], self.compute_dtype)
        starts = [start]
        for part in weights[:-1]:
            starts.append(starts[-1] + part.shape[0])
        options = LossOptions(self.config.vocab_size, self.z_loss if torch.is_grad_enabled() else 0.0, scale)
        halves: list[tuple[Tensor, ...]]
        if self.replicate_embeddings:
            group, halves = None, [(residual.whole(end),) for residual, end in ends]
        else:
            group, spread = self.group, [residual.spread(end) for residual, end in ends]
            halves = [pending.wait() for pending in spread]
        views = [torch.cat(parts).flatten(0, 1) for parts in zip(*halves, strict=True)]
        softmax = self.segments.softmax
        return head_loss(views, weights, products, labels.reshape(-1), starts, options, group, softmax)

    @property
    def _head_slices(self) -> int:
        """Number of slices of the head on this rank."""
        return 1 if self.replicate_embeddings else self.group.local_slices

    @torch.no_grad()
    def logits(self, input_ids: Tensor, document_starts: Tensor | None = None) -> Tensor:
        """Logits [B, T, V] of the whole vocabulary, on every rank. For checks, not for training."""
        ends = self._final_hidden_states(input_ids, document_starts, local_part(self.model.embed_tokens.weight))
        return self._whole_logits(torch.cat([residual.whole(end) for residual, end in ends]))

    @torch.no_grad()
    def next_logits(self, input_ids: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits [B, V] of the token after each row, for the whole vocabulary on every rank.

        Args:
            input_ids: [B, T] token ids that follow those in the cache; [B, 1] after the first call.
            cache: the cache of these rows, with room for T more tokens; these are added to it.
        """
        count = input_ids.shape[1]
        cos, sin = (
            table[cache.positions(count)].unsqueeze(1).to(self.compute_dtype)
            for table in self._rotary_tables(cache.places)
        )
        context = ForwardContext(ReplicatedResidual(self.group), self.eager_segments, cos, sin, cache=cache)
        table = local_part(self.model.embed_tokens.weight)
        x = self._embedded([input_ids], [context.residual], table)[0].wait()
        (stream,) = self._through_layers([ResidualStream(x, None, context)])
        cache.advance(count)
        return self._whole_logits(add_and_norm(stream, self.model.norm)[1][:, -1:])[:, 0]

    def _whole_logits(self, hidden: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, V] on every rank; with a fixed order of sums, each slice is a product of its own."""
        weight, _ = self._head()
        slices = self.weights.get("head", lambda: pieces(weight, self._head_slices), hidden.dtype)
        local = torch.cat([self.eager_segments.logits(hidden, part) for part in slices], dim=1)
        if self.group.size > 1 and not self.replicate_embeddings:
            # If the vocabulary does not divide evenly, the last ranks hold fewer rows: their padding comes at the end.
            width = -(-self.config.padded_vocab_size // self.group.size)
            own = F.pad(local, (0, width - local.shape[1]))
            parts = [torch.empty_like(own) for _ in range(self.group.size)]
            dist.all_gather(parts, own, group=self.group.group)
            local = torch.cat(parts, dim=1)
        return local[:, : self.config.vocab_size].view(*hidden.shape[:2], -1)

    def _final_hidden_states(
        self, input_ids: Tensor, document_starts: Tensor | None, table: Tensor
    ) -> list[tuple[ReplicatedResidual | ShardedResidual, Tensor]]:
        """The final norm's output for token ids [B, T], for each stream in the form in which its residual stores it.

        `table`: this rank's part of the embedding, as returned by `local_part`.
        """
        # A micro-batch of one sequence has no halves. One rank has nothing to wait for, but with a fixed order of sums
        # it has to sum in halves as well, to give the same bits as several ranks.
        overlaps = self.overlap_collectives and (self.group.size > 1 or self.group.fixed_order)
        halves = 2 if overlaps and len(input_ids) > 1 else 1
        parts = input_ids.chunk(halves)
        starts = [None] * halves if document_starts is None else document_starts.chunk(halves)
        contexts = [self._context(part, own) for part, own in zip(parts, starts, strict=True)]
        embedded = self._embedded(parts, [context.residual for context in contexts], table)
        streams: Sequence[ResidualStream] = [
            ResidualStream(x.wait(), None, context) for x, context in zip(embedded, contexts, strict=True)
        ]
        streams = self._through_layers(streams)
        return [(stream.context.residual, add_and_norm(stream, self.model.norm)[1]) for stream in streams]

    def _embedded(
        self, parts: Sequence[Tensor], residuals: Sequence[ReplicatedResidual | ShardedResidual], table: Tensor
    ) -> list[Pending[Tensor]]:
        """Token ids, one [B, T] per residual -> the start of each residual stream, in the compute dtype."""
        # A single look-up for all streams: the backward pass of each one writes a gradient as large as the table.
        input_ids, sizes = torch.cat(list(parts)), [len(part) for part in parts]
        if self.replicate_embeddings:
            whole = F.embedding(input_ids, table).to(self.compute_dtype).split(sizes)
            return [Pending(residual.own(part)) for part, residual in zip(whole, residuals, strict=True)]
        start = self._vocabulary_start(self.model.embed_tokens.weight)
        partial_ = embed_tokens(input_ids, table, start, self.group)
        pieces = partial_.to(self.compute_dtype).split(sizes)
        return [residual.collect([piece]) for piece, residual in zip(pieces, residuals, strict=True)]

    def _context(self, input_ids: Tensor, document_starts: Tensor | None) -> ForwardContext:
        """What all layers share when they process sequences of token ids [B, T]."""
        batch, block = input_ids.shape
        residual: ReplicatedResidual | ShardedResidual
        if self.sequence_parallel:
            residual = ShardedResidual(self.group, (batch, block), self.weights, overlaps=self.overlap_collectives)
        else:
            residual = ReplicatedResidual(self.group, overlaps=self.overlap_collectives)
        cos, sin = self._rotary_tables(block)
        again = self.activation_checkpointing == "selective" and torch.is_grad_enabled()
        if document_starts is None:
            return ForwardContext(residual, self.segments, cos, sin, recomputes_mlp=again)
        # Computed once for all layers: the mask, and each row's tables in the dtype in which attention saves them.
        layout = document_layout(document_starts, self.document_kernel)
        cos, sin = (table[layout.positions].unsqueeze(1).to(self.compute_dtype) for table in (cos, sin))
        return ForwardContext(residual, self.segments, cos, sin, layout.mask, recomputes_mlp=again)

    def _settle_blocks(self) -> None:
        for block in self.model.layers:
            assert isinstance(block, Block)
            block.applies_updates = True

    def _through_layers(self, streams: Sequence[ResidualStream]) -> Sequence[ResidualStream]:
        for layer in self.model.layers:
            if self.activation_checkpointing == "full" and torch.is_grad_enabled():
                # With overlap, a recomputation that stops early would never wait for the other half's collective.
                streams = checkpoint(
                    layer,
                    streams,
                    use_reentrant=False,
                    preserve_rng_state=False,
                    early_stop=not self.overlap_collectives,
                )
            else:
                streams = layer(streams)
        return streams

    def _head(self, table: Tensor | None = None) -> tuple[Tensor, int]:
        """This rank's rows of the output matrix, and the token id of the first row.

        Args:
            table: this rank's part of the embedding, which is also the head if they are tied. Using the same tensor for
                both lets autograd add the second gradient to the first in place.
        """
        parameter = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight
        local = local_part(parameter) if table is None or self.lm_head is not None else table
        return local, self._vocabulary_start(parameter)

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
        """The shape of each whole (unsharded) parameter by name, without vocabulary padding."""
        return {
            name: torch.Size((self._rows(name, parameter), *parameter.shape[1:]))
            for name, parameter in self.named_parameters()
        }

    def whole_parameter(self, name: str) -> Tensor:
        """The whole (unsharded) value of a parameter, without vocabulary padding. Collective."""
        parameter = self.get_parameter(name)
        value = parameter.detach()
        assert isinstance(value, DTensor)
        return value.full_tensor()[: self._rows(name, parameter)]

    def _rows(self, name: str, parameter: nn.Parameter) -> int:
        return self.config.vocab_size if is_vocabulary(name) else parameter.shape[0]

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole (unsharded) value of each parameter, one at a time. Collective."""
        for name, _ in self.named_parameters():
            yield name, self.whole_parameter(name)
