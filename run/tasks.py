"""Benchmark tasks of lm-eval (EleutherAI's lm-evaluation-harness) on a model exported as a Hugging Face folder.

Scores come from lm-eval's own model class, so that they are what anyone else measures on that folder.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from colonnade.errors import UsageError
from colonnade.parallel.vote import one_line

ROOT = Path(__file__).resolve().parent.parent


def require_harness() -> None:
    """Make lm-eval importable.

    lm-eval imports Hugging Face's package `evaluate`, for the metrics of some tasks, by the name that `evaluate.py` has
    here. It is imported first, with this folder left out of the search.

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
    """lm-eval's table of tasks, once it has shown to hold those that are asked for. Needs `require_harness`.

    Raises:
        UsageError: `tasks_path` is no folder, or there is no task (or group of tasks) of a name.
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
    """lm-eval's results by task: each metric, `_stderr` its standard error.

    Args:
        folder: model and tokenizer, as `transformers` reads them.
        manager: from `check_tasks`.
        max_length: tokens the model is given at most.
        prefix: the token that documents began with in training; None: they began with their text. It is put before what
            the model is given where the exported tokenizer does that by itself (`puts_before`), and before text without
            context in any case.
        few_shot: examples before each question; None: as the task says.
        limit: of each task this many questions; None for all.

    Raises:
        UsageError: a task's data cannot be had.
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


def puts_before(tokenizer: Any, prefix: int) -> bool:
    """Whether the special tokens that a tokenizer adds to a text are `prefix` before it, and no others."""
    text = "text"
    added: list[int] = tokenizer.encode(text, add_special_tokens=True)
    return added == [prefix, *tokenizer.encode(text, add_special_tokens=False)]


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A task's metrics by name, without the name of the filter where that is none: `acc,none` is `acc`."""
    return {
        key.removesuffix(",none"): value
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
