"""Health checks during training: skipped steps, spikes, the loss after a restart, parameters before a save."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from colonnade.data.position import DataPosition
from colonnade.errors import RunError
from colonnade.optim.step import StepOutcome
from colonnade.runtime.vote import vote
from colonnade.telemetry.continuity import FIRST_STEPS, loss_continuity
from colonnade.telemetry.fingerprint import require_equal_parameters
from run.state import Run, merged_position


def check_before_save(run: Run) -> None:
    """Check that parameters are finite, and equal where several ranks hold copies. Collective.

    Raises:
        RunError: on all ranks, if they are not; names the parameter and, for unequal copies, the ranks. Nothing is
            saved, and the last checkpoint is kept.
    """
    require_finite_parameters(run.model, run.step)
    if not run.settings.deterministic:  # in that mode, the fingerprint has compared parameters and moments
        require_equal_parameters(run.model, run.step)


@torch.no_grad()
def require_finite_parameters(model: torch.nn.Module, step: int) -> None:
    """Raise RunError on all ranks if any rank holds a parameter with a NaN or an infinity. Collective."""
    with vote():
        held: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            if parameter.to_local().numel():
                held[name] = parameter.to_local()
        # The infinity norm propagates NaN, and is four times as fast as testing each element (torch 2.13, CPU).
        largest = torch.stack(torch._foreach_norm([*held.values()], float("inf")))
        bad = [name for name, is_finite in zip(held, torch.isfinite(largest).tolist(), strict=True) if not is_finite]
        if bad:
            more = f" ({len(bad) - 1} other parameters as well)" if len(bad) > 1 else ""
            raise RunError(
                f"{bad[0]} is not finite after step {step}{more}; nothing was saved, and the last checkpoint stands: "
                "go on from it, with a lower learning rate if this happens again"
            )


@dataclass
class _Noted:
    """A step whose outcome is being copied to the host."""

    step: int
    before: DataPosition | None
    facts: Tensor
    arrived: torch.cuda.Event | None


class StepGuard:
    """Examines each step's outcome without a host sync: on an accelerator, one step later.

    All ranks have the same outcomes and examine them at the same steps, so they stop at the same step.

    Args:
        say: prints a line on the main rank.
    """

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._noted: deque[_Noted] = deque()
        # Reference for the first losses after a restart; None after that comparison, and for a fresh run.
        self._window = run.losses.values() if run.resumed_from is not None else None
        self._first: list[float] = []

    def note(self, outcome: StepOutcome, before: DataPosition | None) -> None:
        """Record the outcome of step `run.step`, and examine the outcomes that are due. Collective as `settle` is.

        On an accelerator the previous step is due, on the CPU this one.

        Args:
            before: the data position at which the step's batch began, as far as this rank's reader knows it.
        """
        numbers = [outcome.loss, outcome.grad_norm, outcome.skipped, *(outcome.losses_before or ())]
        facts = torch.stack([number.double() for number in numbers])
        arrived = None
        if facts.is_cuda:
            facts = torch.empty(facts.shape, dtype=facts.dtype, pin_memory=True).copy_(facts, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._noted.append(_Noted(self._run.step, before, facts, arrived))
        self._look(keep=0 if arrived is None else 1)

    def settle(self) -> None:
        """Examine all steps noted so far. Collective if one of them was skipped or is a spike.

        Raises:
            RunError: on all ranks, if too many steps in a row were skipped.
        """
        self._look(keep=0)

    def _look(self, keep: int) -> None:
        while len(self._noted) > keep:
            noted = self._noted.popleft()
            if noted.arrived is not None:
                noted.arrived.synchronize()
            loss, norm, skipped, *window = noted.facts.tolist()
            why = f"loss {loss:.6g}, gradient norm {norm:.6g}"
            is_spike = bool(window) and loss > window[2]
            if is_spike:
                mean, deviation, _ = window
                why += f"; a spike: the losses before have mean {mean:.6g} and standard deviation {deviation:.3g}"
            if skipped:
                self._skipped(noted, why)
            else:
                self._run.skipped_in_row = 0
                if is_spike:
                    self._say(f"step {noted.step} was taken in spite of its {why}; {self._batch(noted)}")
                self._continuity(loss)

    def _skipped(self, noted: _Noted, why: str) -> None:
        run, limit = self._run, self._run.settings.max_skipped_steps
        run.skipped_steps += 1
        run.skipped_in_row += 1
        in_row, batch = run.skipped_in_row, self._batch(noted)
        self._say(f"step {noted.step} skipped ({in_row} in a row, {run.skipped_steps} in all): {why}; {batch}")
        if in_row >= limit:
            raise RunError(
                f"{in_row} steps in a row were skipped, the last of them step {noted.step} (--max-skipped-steps "
                f"{limit}): {why}; {batch}. The last good checkpoint in {run.directory} stands: look at that text, and "
                "go on from there or from an earlier one, with a lower learning rate"
            )

    def _batch(self, noted: _Noted) -> str:
        """Describe where the step's batch comes from, on ranks that read. Collective over those."""
        run, whole = self._run, merged_position(self._run, noted.before)
        if run.stream is None or whole is None:
            return "its batch: read by another rank"
        return f"its batch: {run.stream.describe(whole, run.global_batch)}"

    def _continuity(self, loss: float) -> None:
        if self._window is None:
            return
        self._first.append(loss)
        if len(self._first) == FIRST_STEPS:
            line = loss_continuity(self._window, self._first)
            self._window = None
            if line is not None:
                self._say(line)
