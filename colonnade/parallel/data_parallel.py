"""Sharding over data-parallel ranks: torch's `fully_shard` with this project's sums (ZeRO-2, ZeRO-3).

The modes are named after ZeRO (arXiv:1910.02054, section 5). In both, each rank stores its shard of every parameter,
gradient and moment, and the parameters of a block are all-gathered before the block computes:

    zero2   once per step; whole parameters stay until the backward pass of the last micro-batch. Gradients are
            accumulated unsharded over the micro-batches, and reduce-scattered once per step.
    zero3   for each forward and each backward pass of a block; whole parameters are freed after it. Gradients are
            reduce-scattered in every micro-batch, so only those of the current block are ever unsharded.

Embedding, final norm and head are one more unit, which in both modes stays gathered from its forward to its backward
pass. A parameter is sharded by rows, after being sharded over the tensor-parallel ranks; the last ranks may hold fewer
rows, or none. Replicas (hybrid sharding) sum their gradients after the backward pass. In the deterministic mode,
`_Reduction` keeps unsharded gradients until the last micro-batch, and then sums over replicas as well.

FSDP's own collectives are replaced for three reasons: gradients are summed, not averaged; the autotuner computes one
rank's share alone; and the deterministic mode sums micro-batches and ranks in one tree (`batch_tree.py`), which a
reduction after each micro-batch would not do.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from colonnade.parallel.batch_tree import leaf_order
from colonnade.parallel.collectives import TensorGroup, all_gather, reduce_scatter, tree_all_reduce, tree_sum
from colonnade.parallel.mesh import ParallelLayout


class DataParallelShards:
    """How a model is sharded over data-parallel ranks, and their collective operations in a step.

    Attributes:
        group: the ranks that shard one replica's parameters.
        replicate_group: the ranks of all replicas that hold the same shard; None with one replica.
        fixed_order: whether the reduction sums over micro-batches and all data-parallel ranks, in the tree.
        merges: number of nodes of the tree over micro-batches that the current micro-batch completes.
        is_last: whether the current micro-batch is the last of its step.
    """

    def __init__(self, root: FSDPModule, layout: ParallelLayout, group: TensorGroup, *, mode: str, fixed_order: bool):
        self._root, self._keeps_whole, self._tensor_group = root, mode == "zero2", group
        self._tp_mesh = layout.tp_mesh
        self.group, self.replicate_group = layout.replica_mesh.get_group(), layout.replicate_group
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.replicas = layout.dp // self.size
        self.fixed_order = fixed_order
        self.merges, self.is_last = 0, True

    @property
    def is_identity(self) -> bool:
        """Whether this rank currently computes alone (`TensorGroup.collectives_as_identity`)."""
        return self._tensor_group.is_identity

    def begin_micro_batch(self, *, is_last: bool, merges: int = 0) -> None:
        """Set the position within its step of the micro-batch that is about to be computed."""
        self.is_last, self.merges = is_last, merges
        if self._keeps_whole:
            self._root.set_reshard_after_backward(is_last)
            # In the fixed order, `_Reduction` gets every micro-batch's gradients, and sums over ranks at the last.
            self._root.set_requires_gradient_sync(is_last or self.fixed_order)

    def reshard(self) -> None:
        """Free the whole parameters: from here on the model's parameters are this rank's shards."""
        for module in _units(self._root):
            module.reshard()

    def forget_failure(self) -> None:
        """Make the model usable again after an error in a forward or backward pass."""
        self.begin_micro_batch(is_last=True)
        if hasattr(self._root, "reset_iter_state"):
            self._root.reset_iter_state()
        else:
            _reset_iteration(self._root)
        self.reshard()

    def gathered(self, part: DTensor) -> Tensor:
        """What this rank would hold of a parameter or gradient without data-parallel sharding. Collective."""
        local = part.to_local()
        shape, _ = compute_local_shape_and_global_offset(part.shape, self._tp_mesh, part.placements[-1:])
        rows = -(-shape[0] // self.size)
        missing = local.new_zeros((rows - local.shape[0], *shape[1:]))
        whole = local.new_empty((self.size * rows, *shape[1:]))
        all_gather(whole, torch.cat((local, missing)), group=self.group)
        return whole[: shape[0]]


def shard_over_data_parallel(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    layout: ParallelLayout,
    group: TensorGroup,
    *,
    mode: str,
    fixed_order: bool,
    gather_dtype: torch.dtype | None = None,
    evaluations: Sequence[str] = (),
) -> DataParallelShards:
    """Shard the parameters of `model` over the data-parallel ranks, in place.

    Call this before creating the optimizer, because it replaces the parameter objects.

    Args:
        model: whole on each data-parallel rank; its parameters are `DTensor`s on the mesh of `ParallelLayout.sharded`.
        blocks: its submodules that are gathered one by one; the rest of the model is one more unit.
        group: its `collectives_as_identity` replaces these collectives as well.
        mode: zero2 or zero3.
        fixed_order: sum gradients in the order of the deterministic mode.
        gather_dtype: the dtype in which the blocks' parameters are gathered; None for their own dtype. If given, their
            gradients have this dtype within a micro-batch, and are summed over ranks and micro-batches in float32.
        evaluations: names of methods that use parameters as `forward` does, without gradients, and return a tensor.
    """
    # Blocks return the results of collectives as views; nothing writes into them, so the warning does not apply.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    # Silences a message, on each rank, that the scaler's flag is reduced over two mesh dimensions one after the other.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    mesh = layout.replica_mesh
    own = MixedPrecisionPolicy(cast_forward_inputs=False)
    lower = own
    if gather_dtype is not None:
        lower = MixedPrecisionPolicy(param_dtype=gather_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=mode == "zero3", mp_policy=lower)
    # An embedding gradient is a sum over all tokens with that id, so it stays in full precision.
    root = fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=own)
    shards = DataParallelShards(root, layout, group, mode=mode, fixed_order=fixed_order)
    for unit in _units(root):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_custom_all_gather(_Gather(shards))  # type: ignore[arg-type]  # its base class is not public
        unit.set_custom_reduce_scatter(_Reduction(shards))  # type: ignore[arg-type]
    # FSDP keeps parameters gathered for the backward pass; without gradients there is none, so reshard at once.
    model.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else shards.reshard())
    for name in evaluations:
        register_fsdp_forward_method(model, name)
        setattr(model, name, _evaluating(getattr(model, name), shards, layout))
    return shards


def _units(root: FSDPModule) -> list[FSDPModule]:
    assert isinstance(root, nn.Module)
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def _reset_iteration(root: FSDPModule) -> None:
    """Equivalent of `FSDPModule.reset_iter_state` of torch 2.13, for torch 2.11 and 2.12, which do not have it."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    common: Any = root._get_fsdp_state()
    for state in common._state_ctx.all_states:
        state._modules_to_run_forward.clear()
        state._training_state = TrainingState.IDLE
        groups = state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
        for group in groups:
            if group is None:
                continue
            group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
            group._reshard_after_forward_event = group._partial_reduce_output = None
            group._post_forward_indices.clear()
            group._training_state = TrainingState.IDLE
            group._to_sharded()
            group.comm_ctx.all_gather_state = None
            group.comm_ctx.post_forward_order.clear()
            if hasattr(group.comm_ctx, "reduce_scatter_states"):
                group.comm_ctx.reduce_scatter_states.clear()
            else:
                group.comm_ctx.reduce_scatter_state = None
    common._state_ctx.iter_forward_root = None
    common._state_ctx.post_backward_final_callback_queued = False


def _evaluating(
    method: Callable[..., Tensor], shards: DataParallelShards, layout: ParallelLayout
) -> Callable[..., Tensor]:
    """`method`, wrapped to reshard the parameters afterwards and to return the first data-parallel rank's result.

    Decisions based on the result, such as where a text ends, must be the same on all ranks. Each call is collective.
    """

    @torch.no_grad()
    def call(*args: Any, **kwargs: Any) -> Tensor:
        result = method(*args, **kwargs).contiguous()
        shards.reshard()
        dist.broadcast(result, group=layout.dp_group, group_src=0)
        return result

    return call


class _Buffers:
    """Allocates the inputs and outputs of FSDP's collectives, as ordinary tensors."""

    def __init__(self, shards: DataParallelShards) -> None:
        self.shards = shards

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Buffers):
    """All-gather of a unit's parameter shards."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        if self.shards.is_identity:  # this rank's shard in place of every rank's
            output_tensor.view(self.shards.size, -1).copy_(input_tensor.clone())
            return None
        return all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


class _Reduction(_Buffers):
    """Reduce-scatter of a unit's gradients: each rank receives the sum for its shard.

    In the fixed order, the gradients of micro-batches wait here until their node of the tree is complete. Before the
    last micro-batch, each rank receives -0.0, the neutral element: adding it leaves the result unchanged to the bit.
    """

    def __init__(self, shards: DataParallelShards) -> None:
        super().__init__(shards)
        self._waiting: list[Tensor] = []

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,  # always a sum
        async_op: bool = False,
    ) -> dist.Work | None:
        shards = self.shards
        if shards.is_identity:
            output_tensor.copy_(input_tensor.view(shards.size, -1)[shards.rank])
            return None
        if not shards.fixed_order:
            return reduce_scatter(output_tensor, input_tensor, group=group, async_op=async_op)
        total = input_tensor
        for _ in range(shards.merges):
            total = self._waiting.pop() + total
        if shards.is_last:
            output_tensor.copy_(self._summed(total, group))
            return None
        if total.is_cuda:
            total.record_stream(torch.cuda.current_stream())  # FSDP allocated it on another stream
        self._waiting.append(total)
        output_tensor.fill_(-0.0)
        return None

    def _summed(self, total: Tensor, group: dist.ProcessGroup) -> Tensor:
        """This rank's part of the sum over all data-parallel ranks, in the tree.

        Data-parallel rank r is rank r mod n of the n ranks that shard replica r div n. The tree splits even ranks from
        odd ones first, so ranks that hold the same shard form its lower levels, and the ranks of a replica its upper
        levels.
        """
        shards = self.shards
        arrived = torch.empty_like(total)
        dist.all_to_all_single(arrived, total, group=group)
        if shards.replicate_group is not None:
            arrived = tree_all_reduce(arrived, shards.replicate_group, leaf_order(range(shards.replicas)))
        parts = arrived.view(shards.size, -1)
        return tree_sum([parts[rank] for rank in leaf_order(range(shards.size))])
