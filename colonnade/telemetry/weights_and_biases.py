"""Sends rows to Weights & Biases, through its client."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colonnade.files import replace_file
from colonnade.runtime.vote import one_line
from colonnade.telemetry.sinks import Row
from colonnade.telemetry.tensorboard import scalars

if TYPE_CHECKING:
    import wandb

ID_NAME = "wandb_run.json"


class WeightsAndBiases:
    """A run in Weights & Biases, under one id for all starts, which is stored in the run's folder.

    `step` is the x-axis of all charts. The client can only append, so steps that a restart repeats appear twice.
    The client honours `WANDB_MODE` (offline, disabled) itself. Without credentials, or if the server cannot be reached,
    this start is recorded offline.

    Args:
        directory: the run's folder; the client's files go into `wandb/` below it.
        project, entity, run_name: as in `wandb.init`; an entity of None is the client's default, a name of None that of
            the folder.
        config: shown as the run's configuration.
        say: called with each line for the screen.

    Attributes:
        ready: a future of the client's run, set when it is open.
    """

    name = "Weights & Biases"

    def __init__(
        self,
        directory: Path,
        *,
        project: str,
        entity: str | None,
        run_name: str | None,
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._directory, self._project, self._entity = directory, project, entity
        self._run_name, self._config, self._say = run_name, dict(config), say
        self.ready: Future[wandb.Run] = Future()

    def open(self, step: int) -> None:
        try:
            self.ready.set_result(self._open())
        except BaseException as error:
            self.ready.set_exception(error)
            raise

    def _open(self) -> wandb.Run:
        import wandb

        run_id = own_id(self._directory, self._project, self._entity)

        def begin(mode: str | None) -> wandb.Run:
            # silent: no prompt for an API key on a terminal, and no output among the run's own. console: otherwise the
            # client would intercept the run's output.
            settings = wandb.Settings(silent=True, console="off")
            return wandb.init(
                project=self._project,
                entity=self._entity,
                name=self._run_name or self._directory.resolve().name,
                id=run_id,
                resume="allow",
                dir=str(self._directory),
                config=self._config,
                settings=settings,
                mode=mode,  # type: ignore[arg-type]
            )

        try:
            run = begin(None)
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:
            if isinstance(error, wandb.errors.CommError):
                reason = f"cannot be reached ({one_line(error)})"
            elif "API key" in str(error):
                reason = "has no API key (wandb login, or WANDB_API_KEY)"
            else:
                raise
            self._say(
                f"warning: {self.name} {reason}: this start is kept offline; wandb sync sends what is in "
                f"{self._directory / 'wandb'}"
            )
            # The client's service process still reserves the id for the run that failed to start.
            wandb.teardown()
            run = begin("offline")
        run.define_metric("*", step_metric="step")
        if not (run.offline or run.disabled):
            self._say(f"{self.name}: {run.url}")
        return run

    def write(self, row: Row) -> None:
        import wandb

        run = self.ready.result()
        if row.get("started"):
            run.config.update({"start": {key: value for key, value in row.items() if key != "started"}}, True)
            return
        values: dict[str, Any] = scalars(row)
        if row.get("samples"):
            texts = [[sample["prompt"], sample["text"]] for sample in row["samples"]]
            values["samples"] = wandb.Table(columns=["prompt", "text"], data=texts)
        if values:
            run.log({"step": row["step"], **values})

    def close(self, failed: bool) -> None:
        self.ready.result().finish(exit_code=int(failed))


def own_id(directory: Path, project: str, entity: str | None) -> str:
    """The id of the folder's run in this project; created and stored if there is none. Raises OSError."""
    path, place = directory / ID_NAME, {"project": project, "entity": entity}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if all(known[key] == value for key, value in place.items()) and isinstance(known["id"], str):
            return str(known["id"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        pass
    run_id = secrets.token_hex(4)
    replace_file(path, json.dumps({"id": run_id, **place}) + "\n")
    return run_id
