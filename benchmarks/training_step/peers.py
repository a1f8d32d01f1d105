"""What our training step is compared with: the same decoder trained by other means, each a `Contender`.

A contender's step is complete: forward and backward of one micro-batch, the gradient norm, clipping to 1.0 and fused
AdamW. Parameters, gradients and moments are float32; bf16 is through torch.autocast, as is usual with each of them. All
run eagerly, or compiled in the way that is usual with each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from benchmarks.training_step.work import BETAS, LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY, Work
from colonnade.decoder.attention import takes_groups
from colonnade.model_config import ModelConfig


@dataclass(frozen=True)
class Contender:
    """One way of training.

    Attributes:
        step: takes an optimizer step and returns the mean loss over the tokens.
        held: returns this rank's parameters and moments, which stay in memory between steps.
        alone: whether it runs on the first rank only, with the threads of all ranks, while the others sleep.
    """

    step: Callable[[], Tensor]
    held: Callable[[], Iterable[Tensor]]
    alone: bool = False


def held_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """This rank's parameters and its optimizer's state, as plain tensors."""
    moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [t.to_local() if isinstance(t, DTensor) else t for t in (*model.parameters(), *moments)]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)


def contender(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], *, alone: bool = False
) -> Contender:
    """Make a contender from `loss`, which runs forward and backward and returns the loss."""

    def step() -> Tensor:
        value = loss()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    return Contender(step, lambda: held_tensors(model, optimizer), alone)


def mixed_precision(work: Work, device: torch.device) -> AbstractContextManager[Any]:
    """torch.autocast in the dtype of the products; a no-op in float32."""
    return torch.autocast(device.type, work.dtype, enabled=work.dtype != torch.float32)


# ---------------------------------------------------------------------------------------------- the plain decoder


class PlainAttention(nn.Module):
    """Causal grouped-query attention over 1 / `parts` of the heads, or over the heads that a parallel plan leaves."""

    def __init__(self, config: ModelConfig, parts: int) -> None:
        super().__init__()
        queries, keys = (n * config.head_dim // parts for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)
        self.head_dim = config.head_dim

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, block, _ = x.shape
        query, key, value = (
            projection(x).view(batch, block, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (rotated(heads, cos, sin) for heads in (query, key))
        group = query.shape[1] // key.shape[1]
        if group > 1 and not takes_groups(query.device, query.dtype):
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
            group = 1
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=group > 1)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, block, -1))


def rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE (arXiv:2104.09864) to [B, n, T, D], pairing the halves of a head as `transformers` does."""
    cos, sin = cos.to(heads.dtype), sin.to(heads.dtype)
    left, right = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-right, left), dim=-1) * sin


class PlainFeedForward(nn.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, config: ModelConfig, parts: int) -> None:
        super().__init__()
        inner = config.intermediate_size // parts
        self.gate_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig, parts: int, whole: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = PlainAttention(config, parts)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = PlainFeedForward(config, parts)
        self.whole = whole

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.whole(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.whole(self.mlp(self.post_attention_layernorm(x)))


class PlainDecoder(nn.Module):
    """The decoder as anyone would write it, unaware of ranks: token ids [B, T] -> logits [B, T, V].

    Its parameters have `transformers`' names, without the leading "model.".

    Args:
        config: the sizes.
        parts: attention heads and feed-forward channels are split into this many parts, of which this is one.
        whole: applied to the partial outputs of attention and feed-forward, to sum them over the parts.
    """

    def __init__(
        self, config: ModelConfig, parts: int = 1, whole: Callable[[Tensor], Tensor] = lambda partial: partial
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(config, parts, whole) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range)
        exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
        angles = torch.outer(torch.arange(config.max_position_embeddings), config.rope_theta**-exponents).repeat(1, 2)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        cos, sin = (table[: input_ids.shape[1]] for table in (self.cos, self.sin))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


# ------------------------------------------------------------------------------------------------------ contenders


def torch_plan(work: Work, mesh: DeviceMesh, device: torch.device, *, compiled: bool = False) -> Contender:
    """torch's native tensor parallelism: `PlainDecoder` under `parallelize_module`, with `loss_parallel`.

    Args:
        compiled: compile each layer, collectives included, as torchtitan does.
    """
    model = parallelized(PlainDecoder(work.config).to(device), mesh)
    if compiled:
        # A layer whose input is still in flight can be compiled, but then its backward pass fails (torch 2.13).
        model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.clone())
        for layer in model.layers:
            layer.compile(fullgraph=True)
    return contender(model, adamw(model), plan_loss(model, work, device))


def parallelized(model: PlainDecoder, mesh: DeviceMesh) -> PlainDecoder:
    """The plan of torch's tensor-parallel tutorial and of torchtitan's Llama, with sequence parallelism.

    The embedding is sharded by rows and its output over the sequence; norms and residuals stay sharded over the
    sequence (all-gather before a column-parallel product, reduce-scatter after a row-parallel one); the head's logits
    stay sharded over the vocabulary. gloo supports the collectives that this needs.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    layer: dict[str, Any] = {
        "input_layernorm": SequenceParallel(),
        "self_attn": PrepareModuleInput(
            input_layouts=(Shard(1), None, None), desired_input_layouts=(Replicate(), None, None)
        ),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "post_attention_layernorm": SequenceParallel(),
        "mlp": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
    }
    plan: dict[str, Any] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    for number in range(len(model.layers)):
        plan |= {f"layers.{number}.{name}": style for name, style in layer.items()}
    parallelize_module(model, mesh, plan)
    return model


def plan_loss(model: nn.Module, work: Work, device: torch.device) -> Callable[[], Tensor]:
    """Forward and backward of a parallelized model."""
    from torch.distributed.tensor.parallel import loss_parallel

    share = work.share(device)
    ids, labels = share[:, :-1].contiguous(), share[:, 1:].flatten()

    def loss() -> Tensor:
        with mixed_precision(work, device):
            logits = model(ids)
        with loss_parallel():
            value = F.cross_entropy(logits.flatten(0, 1).float(), labels)
            value.backward()
        found = value.detach()
        return found.to_local() if isinstance(found, DTensor) else found

    return loss


class _ForwardSum(torch.autograd.Function):
    """Sums a partial result over ranks into a new tensor; the gradient passes through unchanged."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor) -> Tensor:
        total = partial.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def predecessor(work: Work, ranks: int, device: torch.device, *, compiled: bool = False) -> Contender:
    """The scheme of this project's predecessor, re-created to show the cost or gain of replacing it.

    Attention heads and feed-forward channels are sharded; embedding and head are replicated, so each rank computes all
    logits. The outputs of the row-parallel products are summed by an all-reduce outside autograd, and gradients never
    are: each rank trains on the gradients of its own paths only, and clips by the norm of what it holds. So the
    gradients are wrong by design, which is why the scheme was replaced; this measures only its speed.

    Args:
        compiled: compile each layer.
    """
    model = predecessor_model(work.config, ranks).to(device)
    for layer in model.layers if compiled else ():
        layer.compile()
    return contender(model, adamw(model), dense_loss(model, work, device))


def predecessor_model(config: ModelConfig, ranks: int) -> PlainDecoder:
    """A rank's part of `predecessor`: its own heads and channels, with the whole embedding and head."""
    return PlainDecoder(config, ranks, _ForwardSum.apply)


def dense_loss(model: nn.Module, work: Work, device: torch.device) -> Callable[[], Tensor]:
    """Forward and backward of a model that returns all logits."""
    share = work.share(device)
    ids, labels = share[:, :-1].contiguous(), share[:, 1:].flatten()

    def loss() -> Tensor:
        with mixed_precision(work, device):
            logits = model(ids)
        value = F.cross_entropy(logits.flatten(0, 1).float(), labels)
        value.backward()
        return value.detach()

    return loss


def llama(work: Work, device: torch.device, *, compiled: bool = False) -> Contender:
    """`transformers`' LlamaForCausalLM with scaled dot-product attention in one process; it computes its own loss.

    Args:
        compiled: compile the model as a whole.
    """
    model = llama_model(work.config).to(device)
    if compiled:
        model.compile(dynamic=False)
    return contender(model, adamw(model), llama_loss(model, work, device), alone=True)


def llama_model(config: ModelConfig) -> nn.Module:
    """A new LlamaForCausalLM of these sizes.

    Its attention is transformers' "sdpa" under a name that transformers makes no mask for: when it is compiled, "sdpa"
    itself is always given one, with which torch cannot take the flash kernel, nor skip half of the pairs.
    """
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register("sdpa_causal", sdpa_attention_forward)
    sizes: Any = {**config.to_dict(), "use_cache": False}
    model: nn.Module = LlamaForCausalLM._from_config(LlamaConfig(**sizes), attn_implementation="sdpa_causal")
    return model


def llama_loss(model: Any, work: Work, device: torch.device) -> Callable[[], Tensor]:
    """Forward and backward of a LlamaForCausalLM, which computes the loss from the labels."""
    share = work.share(device)
    ids, labels = share[:, :-1].contiguous(), share[:, 1:].contiguous()

    def loss() -> Tensor:
        with mixed_precision(work, device):
            # The labels are already shifted, so that all tokens count, as they do for the other contenders.
            value = model(input_ids=ids, labels=labels, shift_labels=labels).loss
        value.backward()
        found: Tensor = value.detach()
        return found

    return loss
