"""Benchmark tasks of lm-eval (EleutherAI's lm-evaluation-harness) on a model exported as a Hugging Face folder.

Scores come from lm-eval's own model class, so they are what anyone else would measure on that folder.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colonnade.data.tokenization import puts_before
from colonnade.errors import UsageError
from colonnade.runtime.vote import one_line

ROOT = Path(__file__).resolve().parent.parent


def require_harness() -> None:
    """Make lm-eval importable.

    For the metrics of some tasks, lm-eval imports Hugging Face's package `evaluate`, whose name collides with
    `evaluate.py` here. So that package is imported first, with the repository root removed from the import path.

    Raises:
        UsageError: lm-eval is not installed.
    """
    path = list(sys.path)
    sys.path[:] = [entry for entry in path if Path(entry or ".").resolve() != ROOT]
    sys.modules.pop("evaluate", None)
    try:
        for name in ("evaluate", "lm_eval"):
            importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"--tasks needs lm-eval ({one_line(error)}): pip install 'colonnade[eval]'") from error
    finally:
        sys.path[:] = path


def check_tasks(tasks: Sequence[str], tasks_path: str | None) -> Any:
    """Return lm-eval's task manager, after checking that it knows the requested tasks. Call `require_harness` first.

    Raises:
        UsageError: `tasks_path` is not a folder, or there is no task or group of tasks with a requested name.
    """
    from lm_eval.tasks import TaskManager

    if tasks_path is not None and not Path(tasks_path).is_dir():
        raise UsageError(f"--tasks-path {tasks_path} is not a folder; give one with the YAML files of tasks")
    manager = TaskManager(include_path=tasks_path)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise UsageError(
            f"--tasks: there is no task {', '.join(map(repr, unknown))}; `lm-eval ls tasks` lists them, and "
            "--tasks-path names a folder with your own"
        )
    return manager


def run_tasks(
    folder: Path,
    tasks: Sequence[str],
    manager: Any,
    *,
    device: str,
    precision: str,
    batch_size: int,
    max_length: int,
    prefix: int | None,
    few_shot: int | None,
    limit: int | None,
) -> dict[str, Mapping[str, Any]]:
    """Run the tasks; return each task's metrics by name, with standard errors under `_stderr` names.

    Args:
        folder: model and tokenizer, as `transformers` loads them.
        manager: from `check_tasks`.
        max_length: maximum number of tokens per model input.
        prefix: the token that documents began with in training; None if they began with their text. It is put before
            every input if the exported tokenizer does that by itself (`puts_before`), and always before text that has
            no context.
        few_shot: few-shot examples per question; None for the task's own number.
        limit: number of questions from each task; None for all.

    Raises:
        UsageError: a task's data cannot be loaded.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]
    model = HFLM(
        pretrained=str(folder),
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        max_length=max_length,
        add_bos_token=False,
        prefix_token_id=prefix,
    )
    model.add_bos_token = prefix is not None and puts_before(model.tokenizer, prefix)
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=few_shot,
            limit=limit,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except OSError as error:
        raise UsageError(f"--tasks {','.join(tasks)}: data of a task cannot be had ({one_line(error)})") from error
    assert found is not None
    results: dict[str, Mapping[str, Any]] = found["results"]
    return {task: plain(values) for task, values in results.items()}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A task's numeric metrics by name, without the filter name if it is "none": `acc,none` becomes `acc`."""
    return {
        key.removesuffix(",none"): value
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
