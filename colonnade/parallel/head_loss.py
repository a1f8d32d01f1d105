"""Fused head and cross-entropy over vocabulary slices and chunks of tokens: the full logits never exist.

Each rank holds a shard of the vocabulary, cut into slices. For each chunk of m tokens, and each slice:

1. Compute logits [m, v] and replace them in place by their softmax p over the slice; keep three statistics per token:
   maximum, sum of exponentials and the target's logit.
2. All-gather the statistics [slices, 3, m] of all slices. While they are in flight, compute p W, [m, H].
3. The softmax over the whole vocabulary is p times a factor r for each token and slice. So the gradients are r (p W)
   for the tokens h and p^T (r h) for the weight W, minus the target's row, which is handled separately in float32.

The gradients are therefore computed in the forward pass, and the backward pass multiplies them by the incoming
gradient: no product is computed twice. Statistics and losses are float32 or wider. Every number depends on slices
alone, and sums over slices follow the fixed tree: for fixed slices, every tensor-parallel size gives the same bits.

Shapes: M tokens (B * T), m of one chunk, H hidden, v vocabulary entries of one slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from colonnade.parallel.collectives import TensorGroup, tree_sum
from colonnade.parallel.pending import Pending

IGNORE_INDEX = -100
"""The label that is excluded from the loss (the default of `torch.nn.functional.cross_entropy`)."""

# Relative to full float32 logits, a chunk may take 1/8 of the memory. Its own logits take 1/10 in float32, and 1/12 in
# half precision, which also needs float32 copies of some rows and a row block of the weight gradient.
CHUNKS = {torch.float32: 10, torch.float64: 10}
CHUNKS_OF_HALF = 6
SMALLEST_CHUNK = 32
# Bytes, in float32, of the rows whose softmax is computed together, in several passes. On the CPU (where this is per
# thread) they stay in a core's cache, which takes half the time of passes over a whole chunk.
SOFTMAX_IN_CACHE = 1 << 20
SOFTMAX_ELSEWHERE = 1 << 26
# At most 1 / SOFTMAX_PART of a chunk's rows, because in half precision they are float32 copies.
SOFTMAX_PART = 8
# Rows of a weight gradient that are computed in half precision before they are added in float32. On the CPU they stay
# in the cache. Elsewhere a product needs more rows to fill the device: up to 1 / ROW_BLOCK_PART of the chunk's memory.
ROW_BLOCK = 1024
ROW_BLOCK_PART = 8
# Columns of logits and starts of row blocks are multiples of it: where rows do not begin on 16 bytes, cuBLAS takes
# kernels that are several times as slow.
ALIGNED = 128

SliceSoftmax = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class LossOptions:
    """Options of the loss.

    Attributes:
        vocab_size: ids from this one on are padding and never enter the loss.
        z_loss: coefficient of the squared log of the sum of exponentials, added to each token's loss (PaLM,
            arXiv:2204.02311, section 5); 0 disables it.
        scale: factor applied to the loss and its gradients.
    """

    vocab_size: int
    z_loss: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class _Slices:
    """The local vocabulary slices.

    Attributes:
        weights: in the dtype of the products, with as little padding as `ALIGNED` rows allow.
        entries: the number of rows of each that are not padding.
        starts: their first ids.
    """

    weights: Sequence[Tensor]
    entries: Sequence[int]
    starts: Sequence[int]
    group: TensorGroup | None


def head_loss(
    views: Sequence[Tensor],
    weights: Sequence[Tensor],
    products: Sequence[Tensor],
    labels: Tensor,
    starts: Sequence[int],
    options: LossOptions,
    group: TensorGroup | None,
    softmax: SliceSoftmax | None = None,
) -> Tensor:
    """Sum of all tokens' losses (cross-entropy and z-loss) with a vocabulary-sharded head.

    Args:
        views: the final norm's output [M, H], one view per local slice.
        weights: the head's rows [v, H], one tensor per local slice; these receive the gradients.
        products: the same tensors in the dtype of `views`.
        labels: [M] target ids; `IGNORE_INDEX` excludes a token.
        starts: id of the first row of each local slice.
        group: the ranks that hold the other slices; None if `weights` is the whole head.
        softmax: `softmax_of_slice_`, or a compiled version of it.

    Returns:
        A scalar in float32 (float64 for float64 tokens), equal on every rank. It can be differentiated once.

    Raises:
        ValueError: a label is not an id of the vocabulary. Checked only if the labels are on the CPU: on a GPU the
            check would be a host sync.
    """
    if labels.device.type == "cpu":
        _check_labels(labels, options.vocab_size)
    entries = [
        max(0, min(len(product), options.vocab_size - start)) for product, start in zip(products, starts, strict=True)
    ]
    weights_of_products = [
        product[: count + -count % ALIGNED].detach() for product, count in zip(products, entries, strict=True)
    ]
    slices = _Slices(weights_of_products, entries, tuple(starts), group)
    return _HeadLoss.apply(slices, labels, options, softmax or softmax_of_slice_, *views, *weights)


def _check_labels(labels: Tensor, vocab_size: int) -> None:
    strange = labels[((labels < 0) | (labels >= vocab_size)) & (labels != IGNORE_INDEX)]
    if len(strange):
        raise ValueError(f"label {int(strange[0])} is not in the vocabulary of {vocab_size}, nor {IGNORE_INDEX}")


def softmax_of_slice_(logits: Tensor, present: Tensor, position: Tensor) -> Tensor:
    """Replace logits [m, v] of one slice by their softmax over the slice, in place, with the target's entry set to 0.

    Where the slice starts is not an argument: a compiled version would be one graph for each start.

    Args:
        present, position: of the targets [m], from `position_of`.

    Returns:
        statistics [3, m] in float32 or wider: maximum, sum of exponentials relative to it, logit of the target (0 if
        the slice does not hold it).
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Index the flat logits: `scatter_` along rows would first copy all of them to float32.
    flat = logits.view(-1)
    entry = position + torch.arange(len(position), device=position.device) * logits.shape[1]
    target = flat[entry].to(dtype).masked_fill(~present, 0.0)
    if torch.compiler.is_compiling():
        # In one pass with the softmax: to write to `entry` alone, the compiler copies all of the logits.
        is_target = (torch.arange(logits.shape[1], device=logits.device) == position[:, None]) & present[:, None]
        maximum, total = _compiled_softmax_(logits, dtype, is_target)
    else:
        maximum, total = _softmax_(logits, dtype)
        flat.index_copy_(0, entry, flat[entry].masked_fill(present, 0.0))
    return torch.stack((maximum, total, target))


def _compiled_softmax_(logits: Tensor, dtype: torch.dtype, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """`_softmax_` as one kernel, which also sets the entries `is_target` [m, v] to 0."""
    maximum = logits.to(dtype).amax(1, keepdim=True)
    exponentials = (logits.to(dtype) - maximum).exp()
    total = exponentials.sum(1, keepdim=True)
    logits.copy_((exponentials / total).masked_fill(is_target, 0.0))
    return maximum.squeeze(1), total.squeeze(1)


def _softmax_(logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """In-place softmax of logits [m, v], computed in `dtype`; returns the rows' maxima and sums of exponentials [m]."""
    tokens, entries = logits.shape
    on_cpu = logits.device.type == "cpu"
    most = SOFTMAX_IN_CACHE * torch.get_num_threads() if on_cpu else SOFTMAX_ELSEWHERE
    rows = max(1, min(most // (entries * dtype.itemsize), tokens // SOFTMAX_PART))
    buffer = None if logits.dtype == dtype else logits.new_empty((rows, entries), dtype=dtype)
    maxima, totals = [], []
    for block in logits.split(rows):
        wide = block if buffer is None else buffer[: len(block)].copy_(block)
        maximum = wide.amax(1, keepdim=True)
        total = wide.sub_(maximum).exp_().sum(1, keepdim=True)
        wide.mul_(1 / total)
        if buffer is not None:
            block.copy_(wide)
        maxima.append(maximum)
        totals.append(total)
    return torch.cat(maxima).squeeze(1), torch.cat(totals).squeeze(1)


def position_of(labels: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether each label lies in [start, start + width), and its column there (0 if it does not)."""
    present = (labels >= start) & (labels < start + width)
    return present, (labels - start).masked_fill(~present, 0)


def chunk_tokens(tokens: int, dtype: torch.dtype) -> int:
    """Number of tokens whose logits exist at a time."""
    rows = -(-tokens // CHUNKS.get(dtype, CHUNKS_OF_HALF))
    return max(SMALLEST_CHUNK, rows + -rows % 8)


def row_block_of(chunk: int, entries: int, hidden: int, *, on_cpu: bool) -> int:
    """Rows of a slice's weight [entries, hidden] whose gradient is computed in half precision at a time."""
    rows = ROW_BLOCK if on_cpu else max(ROW_BLOCK, chunk * entries // (ROW_BLOCK_PART * hidden))
    return min(entries, rows - rows % ALIGNED)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        slices: _Slices,
        labels: Tensor,
        options: LossOptions,
        softmax: SliceSoftmax,
        *tensors: Tensor,
    ) -> Tensor:
        count = len(slices.weights)
        views, weights = tensors[:count], tensors[count:]
        # In float16, small gradients would underflow with a small scale: it is applied in the backward pass.
        scale = options.scale
        folded = replace(options, scale=1.0) if views[0].dtype == torch.float16 else options
        ctx.rest = scale / folded.scale
        gradients = _Gradients.like(views, weights) if any(ctx.needs_input_grad) else None
        chunk = chunk_tokens(len(labels), views[0].dtype)
        # All chunks reuse one buffer for their logits: on the CPU, fresh pages cost more than the softmax.
        buffers = [view.new_empty((chunk, len(weight))) for view, weight in zip(views, slices.weights, strict=True)]
        losses = []
        for begin in range(0, len(labels), chunk):
            part = slice(begin, begin + chunk)
            own = None if gradients is None else gradients.of(part)
            tokens = [view[part] for view in views]
            losses.append(_chunk_losses(tokens, labels[part], slices, folded, softmax, buffers, own))
        if gradients is not None:
            ctx.gradients = gradients
        return torch.cat(losses).sum() * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        made = ctx.gradients
        ctx.gradients = None
        factor = gradient * ctx.rest
        tensors = [*made.tokens, *made.weights]
        # On the CPU reading the factor is free, unlike a pass over the gradients.
        if factor.device.type != "cpu" or float(factor) != 1.0:
            torch._foreach_mul_(tensors, factor)
        return (None, None, None, None, *tensors)


@dataclass(frozen=True)
class _Gradients:
    """Gradients of the tokens' views [M, H], in their dtype, and of the weights' slices [v, H], in theirs.

    Attributes:
        begins: nothing has been added to the weight gradients yet; their memory is uninitialised.
    """

    tokens: Sequence[Tensor]
    weights: Sequence[Tensor]
    begins: bool = True

    @classmethod
    def like(cls, views: Sequence[Tensor], weights: Sequence[Tensor]) -> _Gradients:
        return cls([torch.empty_like(view) for view in views], [torch.empty_like(weight) for weight in weights])

    def of(self, part: slice) -> _Gradients:
        return _Gradients([gradient[part] for gradient in self.tokens], self.weights, part.start == 0)


def _chunk_losses(
    views: Sequence[Tensor],
    labels: Tensor,
    slices: _Slices,
    options: LossOptions,
    softmax: SliceSoftmax,
    buffers: Sequence[Tensor],
    gradients: _Gradients | None,
) -> Tensor:
    """The unscaled losses [m] of a chunk of tokens. Fills in the tokens' scaled gradients, and adds the weights'."""
    probabilities = [buffer[: len(view)] for buffer, view in zip(buffers, views, strict=True)]
    targets = [position_of(labels, *place) for place in zip(slices.starts, slices.entries, strict=True)]
    statistics = []
    for view, weight, entries, place, own in zip(
        views, slices.weights, slices.entries, targets, probabilities, strict=True
    ):
        if len(weight):
            torch.mm(view, weight.T, out=own)
            own[:, entries:] = -torch.inf  # padding
            statistics.append(softmax(own, *place))
        else:  # a slice of only padding
            statistics.append(_nothing(view, len(labels)))
    pending = _gathered(torch.stack(statistics), slices.group)
    if gradients is not None:
        for own, weight, gradient in zip(probabilities, slices.weights, gradients.tokens, strict=True):
            gradient.zero_() if not len(weight) else torch.mm(own, weight, out=gradient)
    every = pending.wait()  # [V, 3, m]
    highest = every[:, 0].amax(0)
    relative = (every[:, 0] - highest).exp() * every[:, 1]  # [V, m], the slices' sums of exponentials
    total = tree_sum(relative.unbind(0))
    log_total = highest + total.log()
    counted = labels != IGNORE_INDEX
    target = tree_sum(every[:, 2].unbind(0))
    losses = log_total - target
    weight_of_softmax = counted.to(total.dtype)
    if options.z_loss:
        losses = losses + options.z_loss * log_total.square()
        weight_of_softmax = weight_of_softmax * (1 + 2 * options.z_loss * log_total)
    if gradients is not None:
        first = slices.group.rank * len(views) if slices.group is not None else 0
        for number, view in enumerate(views):
            weight, (maximum, own_total, logit) = slices.weights[number], every[first + number]
            if not len(weight):
                if gradients.begins:
                    gradients.weights[number].zero_()
                continue
            factor = relative[first + number] / total * weight_of_softmax * options.scale
            present, position = targets[number]
            row = (logit - maximum).exp() / own_total * factor - counted.to(factor.dtype) * options.scale
            _finish(
                view,
                weight,
                probabilities[number],
                factor.unsqueeze(1),
                (position, row.masked_fill(~present, 0.0).unsqueeze(1)),
                (gradients.tokens[number], gradients.weights[number]),
                begins=gradients.begins,
            )
    return torch.where(counted, losses, 0.0)


def _nothing(view: Tensor, count: int) -> Tensor:
    """The statistics of a slice without entries."""
    dtype = torch.promote_types(view.dtype, torch.float32)
    told = torch.zeros((3, count), dtype=dtype, device=view.device)
    told[0] = torch.finfo(dtype).min
    return told


def _gathered(statistics: Tensor, group: TensorGroup | None) -> Pending[Tensor]:
    return Pending(statistics) if group is None else group.start_gather(statistics)


def _finish(
    view: Tensor,
    weight: Tensor,
    softmax: Tensor,
    factor: Tensor,
    target: tuple[Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    *,
    begins: bool,
) -> None:
    """Gradients of one slice from its softmax.

    Args:
        view: [m, H]; weight: [v, H]; softmax: [m, v], all in the dtype of the products.
        factor: [m, 1], multiplies the softmax.
        target: each target's row [m], and its coefficient [m, 1], which is 0 if the slice does not hold the target.
        gradients: of the view [m, H], which holds softmax @ weight on entry; of the weight [>= v, H].
        begins: overwrite the gradient of the weight instead of adding to it.
    """
    position, coefficient = target
    of_view, of_weight = gradients
    wide = coefficient.dtype
    of_view.copy_(torch.addcmul(of_view.to(wide) * factor, weight.index_select(0, position).to(wide), coefficient))
    scaled = (view.to(wide) * factor).to(view.dtype)
    if begins:
        of_weight[len(weight) :].zero_()
    _add_product(of_weight[: len(weight)], softmax, scaled, begins=begins)
    of_weight.index_add_(0, position, (view.to(wide) * coefficient).to(of_weight.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, begins: bool) -> None:
    """Add left^T right [v, H], of left [m, v] and right [m, H], to `total`; if `begins`, overwrite `total` instead."""
    if total.dtype == left.dtype:
        torch.mm(left.T, right, out=total) if begins else total.addmm_(left.T, right)
        return
    rows = row_block_of(len(left), len(total), right.shape[1], on_cpu=left.device.type == "cpu")
    product = right.new_empty((rows, right.shape[1]))
    for row_block, columns in zip(total.split(rows), left.split(rows, dim=1), strict=True):
        own = torch.mm(columns.T, right, out=product[: len(row_block)])
        row_block.copy_(own) if begins else row_block.add_(own)
