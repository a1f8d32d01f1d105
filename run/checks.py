"""What is watched while a run trains: skipped steps and spikes, the loss after a restart, parameters before a save."""

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
from colonnade.parallel.vote import vote
from colonnade.telemetry.continuity import FIRST_STEPS, loss_continuity
from colonnade.telemetry.fingerprint import require_equal_parameters
from run.state import Run, merged_position


def check_before_save(run: Run) -> None:
    """Refuse to save parameters that are not finite, or of which ranks hold different copies. Collective.

    Raises:
        RunError: on all ranks; names the parameter and the ranks. The last checkpoint stands.
    """
    require_finite_parameters(run.model, run.step)
    if not run.settings.deterministic:  # else the fingerprint has compared them, and the moments as well
        require_equal_parameters(run.model, run.step)


@torch.no_grad()
def require_finite_parameters(model: torch.nn.Module, step: int) -> None:
    """Raises RunError, on all ranks, where a rank holds a parameter with a NaN or an infinity. Collective."""
    with vote():
        held: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            if parameter.to_local().numel():
                held[name] = parameter.to_local()
        # The largest magnitude, which a NaN takes over: four times as fast as asking each element (torch 2.13, CPU).
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
    """A step whose outcome is on its way to the host."""

    step: int
    before: DataPosition | None
    facts: Tensor
    arrived: torch.cuda.Event | None


class StepGuard:
    """Looks at each step's outcome without making the host wait for the device: there a step later.

    All ranks hold the same outcomes and look at them at the same steps, so they stop at the same one.

    Args:
        say: prints a line, on the rank that prints.
    """

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        self._run, self._say = run, say
        self._noted: deque[_Noted] = deque()
        # What the first losses after a restart are compared with; None once they have been, and for a fresh run.
        self._window = run.losses.values() if run.resumed_from is not None else None
        self._first: list[float] = []

    def note(self, outcome: StepOutcome, before: DataPosition | None) -> None:
        """Take in the step that has just become `run.step`; look at the one before it. Collective in `settle`'s way.

        Args:
            before: the data position its batch began at, as far as this rank's reader knows it.
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
        """Look at all steps noted so far. Collective where one was skipped or is a spike.

        Raises:
            RunError: on all ranks: too many steps in a row were skipped.
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
        """Where the step's batch comes from, on the ranks that read. Collective over those."""
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
