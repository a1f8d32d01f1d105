"""The first steps of a run taken twice, sharded over all ranks and unsharded on the first, and their differences.

Both sides have the same settings, the same initial weights (from one seed or one checkpoint) and the same batches. Each
takes the steps of `colonnade.optim.step`, with the run's optimizer, clipping and learning rate. The unsharded ("whole")
side is a mesh of one rank: its forward pass, gradients, norm and update involve no other rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor

from colonnade.checkpoint.hugging_face import load_hugging_face
from colonnade.checkpoint.load import load_model_and_optimizer
from colonnade.checkpoint.single_file import load_single_file
from colonnade.data.blocks import counted_targets
from colonnade.errors import RunError
from colonnade.model_config import ModelConfig
from colonnade.optim.optimizer import set_learning_rate
from colonnade.optim.schedule import schedule_of
from colonnade.optim.step import StepOutcome, optimizer_step
from colonnade.parallel.mesh import ParallelLayout
from colonnade.run_settings import RunSettings
from colonnade.runtime.vote import vote
from colonnade.telemetry.differences import Difference, Norms, differences, relative, worst_of
from colonnade.tuning.memory import is_out_of_memory
from run.model import build_model, build_optimizer


@dataclass(frozen=True)
class Subject:
    """What is compared: a run with these settings, and the blocks of its first steps.

    Attributes:
        checkpoint: where the weights come from; None for the initial weights of the seed.
        has_record: whether `checkpoint` is a checkpoint folder rather than a single file.
        micro_batch: sequences per micro-batch; both sides accumulate as many micro-batches as make up a step.
        blocks: int32 [steps, sequences, T + 1] in the wire format of `colonnade/data/blocks.py`.
    """

    settings: RunSettings
    config: ModelConfig
    checkpoint: Path | None
    has_record: bool
    micro_batch: int
    blocks: Tensor


@dataclass(frozen=True)
class Numerics:
    """The precision of activations and matrix products, and whether projections use float8."""

    precision: str
    float8: bool = False

    @classmethod
    def of(cls, settings: RunSettings) -> Numerics:
        return cls(settings.precision, settings.float8)

    def __str__(self) -> str:
        return f"{self.precision} with float8" if self.float8 else self.precision


EXACT = Numerics("fp32")


@dataclass(frozen=True)
class StepParity:
    """One step on both sides; in each pair, the whole side comes first.

    Attributes:
        losses, norms: loss and gradient norm (before clipping) of each side.
        skipped: whether each side skipped the step because something in it was not finite.
        gradient: difference of the gradients that the optimizer is given (summed and clipped), for the worst parameter
            (`colonnade/telemetry/differences.py`). None if neither side took the step.
        rounding: in numerics lower than fp32, the same difference between them and fp32, both on the whole side: the
            effect of the numerics alone.
    """

    step: int
    losses: tuple[float, float]
    norms: tuple[float, float]
    skipped: tuple[bool, bool]
    gradient: Difference | None
    rounding: Difference | None = None

    @property
    def loss_difference(self) -> float:
        return relative(*self.losses)

    @property
    def norm_difference(self) -> float:
        return relative(*self.norms)


@dataclass
class WholeSide:
    """Results of the whole side, on the CPU: the gradients of each step, and the parameters after the last step."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class NumericsParity:
    """The comparison of all steps in the same numerics.

    Attributes:
        tolerance: largest relative difference allowed; below fp32, as a multiple of `StepParity.rounding`.
        parameters: difference of the worst parameter after the last step.
        parameters_rounding: in numerics lower than fp32, the same between them and fp32, both on the whole side.
        whole: results of the fp32 whole side, kept if lower numerics are compared with it later.
    """

    numerics: Numerics
    tolerance: float
    steps: list[StepParity] = field(default_factory=list)
    parameters: Difference | None = None
    parameters_rounding: Difference | None = None
    whole: WholeSide | None = None

    def limit(self, rounding: Difference | None) -> float:
        """The largest difference allowed if the numerics alone cause a difference of `rounding` (None for fp32)."""
        return self.tolerance * (1.0 if rounding is None else rounding.value)

    def problem(self) -> str | None:
        """A description of the first difference above the tolerance; None if all are within it."""
        for each in self.steps:
            if each.skipped[0] != each.skipped[1]:
                return f"step {each.step} is skipped {'whole' if each.skipped[0] else 'cut'} alone"
            if each.gradient is None:
                continue
            limit = self.limit(each.rounding)
            for what, value in (
                (f"the gradient of {each.gradient.name}", each.gradient.value),
                ("the gradient norm", each.norm_difference),
                ("the loss", each.loss_difference),
            ):
                if not value <= limit:
                    return f"{what} in step {each.step} differs by {value:.1e}, above {limit:.1e}"
        if self.parameters is None:
            return "no step was taken: loss or gradients were not finite in each"
        limit = self.limit(self.parameters_rounding)
        if not self.parameters.value <= limit:
            name, value = self.parameters.name, self.parameters.value
            return f"{name} after the last step differs by {value:.1e}, above {limit:.1e}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """The results as plain values; each difference includes its parameter's name."""
        steps = [
            {**asdict(step), "loss_difference": step.loss_difference, "norm_difference": step.norm_difference}
            for step in self.steps
        ]
        return {
            "precision": str(self.numerics),
            "tolerance": self.tolerance,
            "steps": steps,
            "parameters": None if self.parameters is None else asdict(self.parameters),
            "parameters_rounding": None if self.parameters_rounding is None else asdict(self.parameters_rounding),
        }


# ------------------------------------------------------------------------------------------------------- one side


class Side:
    """A run's model and optimizer on the ranks of `layout`."""

    def __init__(self, subject: Subject, layout: ParallelLayout, numerics: Numerics) -> None:
        settings = subject.settings.replace(float8=numerics.float8)
        self.subject, self.layout = subject, layout
        self.model = build_model(settings, subject.config, layout, numerics.precision)
        self.optimizer = build_optimizer(self.model, settings)
        self.scaler = GradScaler(layout.device.type, enabled=numerics.precision == "fp16")
        self._schedule = schedule_of(settings, 0, 0)

    def load(self, group: dist.ProcessGroup | None) -> None:
        """Load the weights of the checkpoint or of --init-from, if any. Collective over `group`, the side's ranks."""
        path, init_from = self.subject.checkpoint, self.subject.settings.init_from
        if path is None:
            if init_from is not None:
                with vote(group):
                    load_hugging_face(Path(init_from), model=self.model, vocabulary_size=self.model.config.vocab_size)
            return
        if self.subject.has_record:
            load_model_and_optimizer(path, model=self.model, optimizer=None, group=group)
        else:
            with vote(group):
                load_single_file(path, model=self.model, vocabulary_size=self.subject.config.vocab_size)

    def take_step(self, index: int, look: Callable[[], None]) -> StepOutcome:
        """Take step `index` (from 0). `look` is called just before the optimizer updates, unless it is skipped."""
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
                plain=settings.plain_step,
            )
        finally:
            hook.remove()

    def tensors(self, *, gradients: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and full value of each parameter, or of its gradient, one at a time. Collective."""
        for name, parameter in self.model.named_parameters():
            tensor = parameter.grad if gradients else parameter.detach()
            assert isinstance(tensor, DTensor)
            yield name, tensor.full_tensor()


# ------------------------------------------------------------------------------------------------------ both sides


def compare_sides(
    subject: Subject,
    layout: ParallelLayout,
    alone: ParallelLayout,
    numerics: Numerics,
    tolerance: float,
    *,
    against: NumericsParity | None = None,
    keep: bool = False,
) -> NumericsParity:
    """Take the subject's steps on both sides and compare. Collective; only the first rank has the differences.

    Args:
        alone: the mesh of the first rank alone (`first_rank_alone`).
        against: the comparison in fp32, which kept its whole side; None if this is that comparison.
        keep: whether to keep the results of the whole side.

    Raises:
        UsageError: the model cannot be sharded over these ranks, or the checkpoint does not fit it.
        RunError: the first rank does not have enough memory for both sides.
    """
    parity, kept = NumericsParity(numerics, tolerance), WholeSide()
    with vote():
        cut = Side(subject, layout, numerics)
    cut.load(None)
    whole = None
    with vote(), _memory_told():
        if layout.is_main:
            whole = Side(subject, alone, numerics)
            whole.load(alone.tp_group)
    for index in range(len(subject.blocks)):
        first, expected = None, None
        with vote(), _memory_told():
            if whole is not None:
                first, expected = _whole_step(whole, index)
        rounding = None
        if expected is not None:
            if keep:
                kept.gradients.append({name: value.cpu().clone() for name, value in expected.items()})
            if against is not None and against.whole is not None and expected:
                # If fp32 skipped this step, there are no gradients to measure the effect of these numerics by.
                fp32 = against.whole.gradients[index]
                rounding = worst_of(differences(expected.items(), fp32)) if fp32 else None
        second, found = _cut_step(cut, index, expected)
        if first is not None:
            parity.steps.append(_step_parity(index + 1, first, second, found, rounding))
    _compare_parameters(parity, cut, whole, against)
    if keep and whole is not None:
        kept.parameters = {name: value.cpu() for name, value in whole.tensors(gradients=False)}
        parity.whole = kept
    return parity


def _compare_parameters(parity: NumericsParity, cut: Side, whole: Side | None, against: NumericsParity | None) -> None:
    """Compare the parameters after the last step. Collective."""
    expected = dict(whole.tensors(gradients=False)) if whole is not None else None
    found = differences(cut.tensors(gradients=False), expected)
    if expected is None or all(all(step.skipped) for step in parity.steps):
        return
    parity.parameters = worst_of(found, at_least_average=True)
    if against is not None and against.whole is not None:
        parity.parameters_rounding = worst_of(
            differences(expected.items(), against.whole.parameters), at_least_average=True
        )


def _whole_step(whole: Side, index: int) -> tuple[StepOutcome, dict[str, Tensor]]:
    """Take a step; return its outcome and the gradients as the optimizer got them, empty if it was skipped."""
    gradients: dict[str, Tensor] = {}
    # The gradient tensors themselves: a mesh of one gathers and copies nothing, and the step drops its references.
    outcome = whole.take_step(index, lambda: gradients.update(whole.tensors(gradients=True)))
    return outcome, gradients


def _cut_step(cut: Side, index: int, expected: Mapping[str, Tensor] | None) -> tuple[StepOutcome, dict[str, Norms]]:
    """Take a step; return its outcome and the differences of its gradients from `expected`. Collective."""
    found: dict[str, Norms] = {}
    outcome = cut.take_step(index, lambda: found.update(differences(cut.tensors(gradients=True), expected)))
    return outcome, found


def _step_parity(
    step: int,
    whole: StepOutcome,
    cut: StepOutcome,
    found: Mapping[str, Norms],
    rounding: Difference | None,
) -> StepParity:
    losses, norms = (float(whole.loss), float(cut.loss)), (float(whole.grad_norm), float(cut.grad_norm))
    skipped = bool(whole.skipped), bool(cut.skipped)
    return StepParity(step, losses, norms, skipped, None if all(skipped) or not found else worst_of(found), rounding)


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
