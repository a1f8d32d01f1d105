"""The first steps of a run taken twice, cut over all ranks and whole on the first one, and what differs.

Both sides have the same settings, the same initial weights (of one seed, or one checkpoint) and the same batches. Each
takes the steps of `colonnade.optim.step`, with AdamW, clipping and learning rate as the run has them. The side on the
first rank is a mesh of one: its forward pass, gradients, norm and update have no other rank in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor

from colonnade.checkpoint.load import load_model_and_optimizer
from colonnade.checkpoint.single_file import load_single_file
from colonnade.data.blocks import counted_targets
from colonnade.errors import RunError
from colonnade.model_config import ModelConfig
from colonnade.optim.optimizer import allocate_state, create_adamw, fused_keeps_bits, set_learning_rate
from colonnade.optim.schedule import CosineSchedule
from colonnade.optim.step import StepOutcome, optimizer_step
from colonnade.parallel.mesh import ParallelLayout
from colonnade.parallel.vote import vote
from colonnade.run_settings import RunSettings
from colonnade.tuning.memory import is_out_of_memory
from model import TensorParallelModel
from run_assembly import DTYPES
from run_inputs import is_compiled

# A parameter's difference is measured against its own norm, but not against less than this share of the whole model's.
# Where a gradient is nothing but rounding (that of a key bias is 0 in exact arithmetic) its own norm means nothing.
NORM_FLOOR = 1e-3
# Sides that agree on less of a gradient than this have only its rounding, or an error that the floor lets through.
UNDETERMINED = 0.1


@dataclass(frozen=True)
class Subject:
    """What is compared: a run as its settings say, and the blocks of its first steps.

    Attributes:
        checkpoint: where the weights come from; None for those of the seed.
        has_record: whether that is a checkpoint's folder, not a single file.
        micro_batch: sequences; both sides accumulate as many as make up a step.
        blocks: int32 [steps, sequences, T + 1] in the wire format of `colonnade/data/blocks.py`.
    """

    settings: RunSettings
    config: ModelConfig
    checkpoint: Path | None
    has_record: bool
    micro_batch: int
    blocks: Tensor


@dataclass(frozen=True)
class Difference:
    """A relative difference of a tensor, and the parameter it belongs to."""

    value: float
    name: str


@dataclass(frozen=True)
class StepParity:
    """One step on both sides; the whole one stands first in pairs.

    Attributes:
        losses, norms: of each side; the norm before clipping.
        skipped: of each side, whether the step was left out because something in it was not finite.
        gradient: the worst parameter's: norm of the difference over the norm (`NORM_FLOOR`), of the gradients that
            AdamW is given: summed and clipped. None where neither side took the step.
    """

    step: int
    losses: tuple[float, float]
    norms: tuple[float, float]
    skipped: tuple[bool, bool]
    gradient: Difference | None

    @property
    def loss_difference(self) -> float:
        return _relative(*self.losses)

    @property
    def norm_difference(self) -> float:
        return _relative(*self.norms)


@dataclass
class PrecisionParity:
    """All steps in one precision.

    Attributes:
        parameters: the worst parameter after the last step.
        undetermined: parameters left out of that: gradients of pure rounding, which AdamW, dividing by their size,
            makes into steps of full length.
        first_gradients: of the whole side in the first step, on the CPU: what another precision is held against.
        rounding: how far the whole side's first gradients are from those: what this precision itself costs.
    """

    precision: str
    tolerance: float
    steps: list[StepParity] = field(default_factory=list)
    parameters: Difference | None = None
    undetermined: set[str] = field(default_factory=set)
    first_gradients: dict[str, Tensor] | None = None
    rounding: Difference | None = None

    def problem(self) -> str | None:
        """The first thing above the tolerance, in words; None where all is within it."""
        for each in self.steps:
            if each.skipped[0] != each.skipped[1]:
                return f"step {each.step} is skipped {'whole' if each.skipped[0] else 'cut'} alone"
            if each.gradient is None:
                continue
            for what, value in (("loss", each.loss_difference), ("gradient norm", each.norm_difference)):
                if not value <= self.tolerance:
                    worst = f" (worst gradient: {each.gradient.name}, by {each.gradient.value:.1e})"
                    return f"the {what} of step {each.step} differs by {value:.1e}{worst}"
            if not each.gradient.value <= self.tolerance:
                return f"the gradient of {each.gradient.name} in step {each.step} differs by {each.gradient.value:.1e}"
        if self.parameters is None:
            return "no step was taken: loss or gradients were not finite in each"
        if not self.parameters.value <= self.tolerance:
            return f"{self.parameters.name} after the last step differs by {self.parameters.value:.1e}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """What was found, as plain values; differences with the parameter's name."""
        steps = [
            {**asdict(step), "loss_difference": step.loss_difference, "norm_difference": step.norm_difference}
            for step in self.steps
        ]
        return {
            "precision": self.precision,
            "tolerance": self.tolerance,
            "steps": steps,
            "parameters": None if self.parameters is None else asdict(self.parameters),
            "undetermined": sorted(self.undetermined),
            "rounding": None if self.rounding is None else asdict(self.rounding),
        }


# ------------------------------------------------------------------------------------------------------- one side


class Side:
    """A model with its optimizer, as a run has them, on the ranks of `layout`."""

    def __init__(self, subject: Subject, layout: ParallelLayout, precision: str) -> None:
        settings = subject.settings
        self.subject, self.layout = subject, layout
        self.model = TensorParallelModel(
            subject.config,
            layout,
            seed=settings.seed,
            slices=settings.tensor_slices,
            replicate_embeddings=settings.replicate_embeddings,
            compute_dtype=DTYPES[precision],
            gradient_checkpointing=not settings.disable_gradient_checkpointing,
            compiled=is_compiled(settings, layout),
        )
        self.optimizer = create_adamw(
            self.model,
            learning_rate=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            weight_decay=settings.weight_decay,
            fused=not settings.deterministic
            or fused_keeps_bits(self.model.parameters(), [count for _, count in self.model.pieces]),
        )
        allocate_state(self.optimizer)
        self.scaler = GradScaler(layout.device.type, enabled=precision == "fp16")
        assert settings.min_learning_rate is not None
        self._schedule = CosineSchedule(
            peak=settings.learning_rate,
            minimum=settings.min_learning_rate,
            warmup_steps=settings.warmup_steps,
            total_steps=settings.total_steps,
        )

    def load(self, group: dist.ProcessGroup | None) -> None:
        """The checkpoint's weights, where there is one. Collective over `group`, the side's ranks."""
        path = self.subject.checkpoint
        if path is None:
            return
        if self.subject.has_record:
            load_model_and_optimizer(path, model=self.model, optimizer=None, group=group)
        else:
            with vote(group):
                load_single_file(path, model=self.model, vocabulary_size=self.subject.config.vocab_size)

    def take_step(self, index: int, look: Callable[[], None]) -> StepOutcome:
        """Step `index` (from 0). `look` is called when the gradients are as AdamW gets them, if it is asked at all."""
        subject, settings = self.subject, self.subject.settings
        blocks = subject.blocks[index]
        share = blocks[self.layout.dp_rank :: self.layout.dp]
        set_learning_rate(self.optimizer, self._schedule(index))
        hook = self.optimizer.register_step_pre_hook(lambda *_: look())
        try:
            return optimizer_step(
                self.model,
                self.optimizer,
                self.scaler,
                share.to(self.layout.device),
                accumulation=share.shape[0] // subject.micro_batch,
                targets=counted_targets(blocks, settings.document_mask),
                max_grad_norm=settings.max_grad_norm,
                document_mask=settings.document_mask,
                deterministic=settings.deterministic,
            )
        finally:
            hook.remove()

    def tensors(self, *, gradients: bool) -> Iterator[tuple[str, Tensor]]:
        """Name and whole value of each parameter, or of its gradient, one at a time. Collective."""
        for name, parameter in self.model.named_parameters():
            tensor = parameter.grad if gradients else parameter.detach()
            assert isinstance(tensor, DTensor)
            yield name, tensor.full_tensor()


# ------------------------------------------------------------------------------------------------------ both sides


def compare_sides(
    subject: Subject,
    layout: ParallelLayout,
    alone: ParallelLayout,
    precision: str,
    tolerance: float,
    *,
    against: Mapping[str, Tensor] | None = None,
    keep_gradients: bool = False,
) -> PrecisionParity:
    """Take the subject's steps on both sides. Collective; what differs is known to the first rank.

    Args:
        alone: the mesh of the first rank (`first_rank_alone`).
        against: the whole side's first gradients in another precision.
        keep_gradients: return those of this one.

    Raises:
        UsageError: the sizes cannot be cut over these ranks, or the checkpoint does not fit them.
        RunError: the first rank has not the memory for both sides.
    """
    parity = PrecisionParity(precision, tolerance)
    with vote():
        cut = Side(subject, layout, precision)
    cut.load(None)
    whole = None
    with vote(), _memory_told():
        if layout.is_main:
            whole = Side(subject, alone, precision)
            whole.load(alone.tp_group)
    for index in range(len(subject.blocks)):
        first, expected = None, None
        with vote(), _memory_told():
            if whole is not None:
                first, expected = _whole_step(whole, index)
        if index == 0 and expected is not None:
            if against is not None:
                parity.rounding = _worst(_differences(expected.items(), against))
            if keep_gradients:
                parity.first_gradients = {name: value.cpu().clone() for name, value in expected.items()}
        second, found = _cut_step(cut, index, expected)
        if first is not None:
            parity.steps.append(_step_parity(index + 1, first, second, found))
            parity.undetermined |= {name for name, (delta, norm) in found.items() if not delta <= UNDETERMINED * norm}
    expected = dict(whole.tensors(gradients=False)) if whole is not None else None
    found = _differences(cut.tensors(gradients=False), expected)
    if not all(all(step.skipped) for step in parity.steps):
        determined = {name: pair for name, pair in found.items() if name not in parity.undetermined}
        parity.parameters = _worst(determined or found)
    return parity


def _whole_step(whole: Side, index: int) -> tuple[StepOutcome, dict[str, Tensor]]:
    """A step and its gradients, as AdamW got them; none where it was not asked to take it."""
    gradients: dict[str, Tensor] = {}
    # The tensors themselves, which the step lets go of: on a mesh of one nothing is gathered or copied.
    outcome = whole.take_step(index, lambda: gradients.update(whole.tensors(gradients=True)))
    return outcome, gradients


def _cut_step(
    cut: Side, index: int, expected: Mapping[str, Tensor] | None
) -> tuple[StepOutcome, dict[str, tuple[float, float]]]:
    """A step, and what its gradients differ by from those expected. Collective."""
    found: dict[str, tuple[float, float]] = {}
    outcome = cut.take_step(index, lambda: found.update(_differences(cut.tensors(gradients=True), expected)))
    return outcome, found


def _step_parity(
    step: int, whole: StepOutcome, cut: StepOutcome, found: Mapping[str, tuple[float, float]]
) -> StepParity:
    losses, norms = (float(whole.loss), float(cut.loss)), (float(whole.grad_norm), float(cut.grad_norm))
    skipped = bool(whole.skipped), bool(cut.skipped)
    return StepParity(step, losses, norms, skipped, None if all(skipped) or not found else _worst(found))


def _differences(
    tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, Tensor] | None
) -> dict[str, tuple[float, float]]:
    """Of each tensor the norm of what it differs by, and the norm of what is expected, both summed in float64.

    Every tensor is gone through, since gathering it is collective, also where None is expected and nothing compared.
    """
    found = {}
    for name, tensor in tensors:
        if expected is not None:
            wanted = expected[name].to(tensor.device) if name in expected else torch.full_like(tensor, math.nan)
            found[name] = _norm(tensor - wanted), _norm(wanted)
    return found


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))


def _worst(found: Mapping[str, tuple[float, float]]) -> Difference:
    floor = NORM_FLOOR * math.sqrt(sum(norm**2 for _, norm in found.values()))
    ratios = {name: _ratio(delta, max(norm, floor)) for name, (delta, norm) in found.items()}
    # A NaN is worse than any number, and no comparison finds it.
    name = max(ratios, key=lambda name: math.inf if math.isnan(ratios[name]) else ratios[name])
    return Difference(ratios[name], name)


def _relative(expected: float, actual: float) -> float:
    return _ratio(abs(actual - expected), abs(expected))


def _ratio(difference: float, size: float) -> float:
    return difference / size if size else (0.0 if difference == 0 else math.inf)


@contextmanager
def _memory_told() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            "out of memory with the whole model beside the first rank's share of it; compare a model of fewer layers, "
            "or a smaller --block-size or --initial-batch-size: what is compared is the same in every layer"
        ) from error
