"""A training step never waits for its device: nothing in it reads a value that a device computes, or sends it one.

Run on torch's meta device, whose tensors have shapes and no values: a read (`.item()`, `bool()`, a mask as an index)
raises there, and where the code asks for the kind of device it gets what a GPU gets, not what the CPU does. A copy from
the host's ordinary memory waits as well; what is copied once, in the first step, may stay.
"""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from colonnade.optim.loss_window import LossWindow
from colonnade.optim.optimizer import allocate_state, create_adamw, create_muon
from colonnade.optim.step import optimizer_step
from colonnade.parallel.mesh import ParallelLayout, init_parallel
from model import ModelConfig, TensorParallelModel

META = torch.device("meta")
BLOCK, CHUNKS, MICRO_BATCHES = 32, 4, 2
CONFIG = ModelConfig(
    vocab_size=250,
    max_position_embeddings=BLOCK,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
)


@pytest.fixture(scope="module")
def layout():
    """The first of 2 x 2 ranks, the others of which are not there: collectives return what memory holds."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_parallel(2, META)
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def fused_on_any_device(monkeypatch):
    """The fused kernel has a shape function, and torch's list of devices it is for does not name this one."""
    monkeypatch.setattr(import_module("torch.optim.adam"), "_device_dtype_check_for_fused", lambda *_, **__: None)


class NoTransfers(TorchDispatchMode):
    """Refuses what copies values from the host to the device."""

    def __enter__(self):
        self._made = torch.tensor  # which no mode sees
        torch.tensor = self._tensor  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *raised):
        torch.tensor = self._made
        return super().__exit__(*raised)

    def _tensor(self, values, **options):
        assert torch.device(options.get("device") or "cpu") != META, f"{values} are sent to the device"
        return self._made(values, **options)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        source = {"copy_": 1, "_to_copy": 0}.get(function.overloadpacket.__name__)
        if source is not None and result.device == META and arguments[source].ndim:
            assert arguments[source].device == META, f"{tuple(result.shape)} values are sent to the device"
        return result


def steps(
    layout: ParallelLayout,
    model_options: dict[str, Any],
    step_options: dict[str, Any],
    *,
    dtype: torch.dtype = torch.bfloat16,
    muon: bool = False,
) -> torch.Tensor:
    """Two steps of two micro-batches, whose losses are watched for spikes; the last one's loss."""
    model = TensorParallelModel(CONFIG, layout, compute_dtype=dtype, **model_options)
    rates: dict[str, Any] = {"learning_rate": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer = create_muon(model, **rates) if muon else create_adamw(model, **rates)
    allocate_state(optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    share = torch.zeros((CHUNKS, BLOCK + 1), dtype=torch.int64, device=META)
    window = LossWindow(4, META)
    for watch in (nullcontext(), NoTransfers()):
        with watch:
            outcome = optimizer_step(
                model,
                optimizer,
                scaler,
                share,
                accumulation=MICRO_BATCHES,
                targets=2 * CHUNKS * BLOCK,
                max_grad_norm=1.0,
                skip_above=window.statistics(3.0).limit,
                **step_options,
            )
            window.append(outcome.loss, outcome.skipped)
    assert outcome.loss.device == outcome.grad_norm.device == META
    return outcome.loss


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "plain": ({"overlap_weight_gradients": False}, {"plain": True}),
    "documents": ({}, {"document_mask": True}),
    "sequence parallel": ({"sequence_parallel": True}, {}),
    "overlapped": ({"overlap_collectives": True}, {}),
    "overlapped, sequence parallel": ({"overlap_collectives": True, "sequence_parallel": True}, {}),
    "selective": ({"activation_checkpointing": "selective"}, {}),
    "full": ({"activation_checkpointing": "full", "overlap_collectives": True}, {}),
    "whole embeddings, z-loss": ({"replicate_embeddings": True, "z_loss": 1e-4}, {}),
    "deterministic": ({"slices": 4}, {"deterministic": True}),
    "deterministic, sequence parallel": ({"slices": 4, "sequence_parallel": True}, {"deterministic": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_no_value_of_its_device(layout, case):
    loss = steps(layout, *CASES[case])
    with pytest.raises(RuntimeError, match="meta"):  # what any read within the step would have met with
        loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nor_in_other_precisions(layout, dtype):
    steps(layout, {}, {}, dtype=dtype)


def test_nor_with_muon(layout):
    steps(layout, {}, {}, muon=True)
