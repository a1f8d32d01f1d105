"""Loss, perplexity and bits per byte of a checkpoint, or of a Hugging Face folder, on text, on any number of ranks.

    python evaluate.py --checkpoint-path pretrained --data-glob 'held_out/*.parquet'
    torchrun --nproc_per_node=2 evaluate.py --checkpoint-path pretrained \
      --data-glob 'web=web/*.parquet,code=code/*.jsonl' --json scores.json
    python evaluate.py --checkpoint-path pretrained --tasks arc_easy,hellaswag

Every token is scored once. lm-eval runs the tasks on the Hugging Face folder, or on the checkpoint as `export_hf.py`
exports it (`docs/evaluation.md`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colonnade.command_settings import EvaluationSettings
from colonnade.errors import UsageError
from colonnade.files import require_place, write_text
from colonnade.flags import parse_evaluation
from colonnade.runtime.launch import launch

if TYPE_CHECKING:
    from colonnade.data.mixture import CorpusPattern
    from colonnade.data.shards import Shard
    from colonnade.parallel.mesh import ParallelLayout
    from run.evaluation import Plan, Score
    from run.trained_model import TrainedModel


def main(arguments: list[str] | None = None) -> None:
    settings = parse_evaluation(arguments)
    # Importing torch takes seconds, so it waits until the flags have been validated.
    from colonnade.parallel.mesh import init_parallel, world_size_from_environment
    from colonnade.runtime.vote import on_first_rank, vote
    from run.evaluation import corpora_of, open_corpora, plan_of
    from run.trained_model import open_trained

    manager = None
    if settings.tasks is not None:
        if world_size_from_environment() > 1:
            raise UsageError("--tasks: lm-eval runs the exported model in one process; start it without torchrun")
        manager = prepare_tasks(settings)
    layout = init_parallel(settings.tensor_parallel_size)
    on_first_rank(lambda: require_place("--json", settings.json))
    trained = open_trained(settings)
    with vote():
        plan = plan_of(settings, trained)
        corpora = () if settings.data_glob is None else corpora_of(settings.data_glob)
    shards = on_first_rank(lambda: open_corpora(corpora, plan))
    scores = score_texts(settings, trained, layout, plan, list(zip(corpora, shards, strict=True)))
    results = {} if manager is None else score_tasks(settings, trained, layout, plan, manager)
    on_first_rank(lambda: write_report(settings, trained, plan, scores, results))


def score_texts(
    settings: EvaluationSettings,
    trained: TrainedModel,
    layout: ParallelLayout,
    plan: Plan,
    corpora: Sequence[tuple[CorpusPattern, Sequence[Shard]]],
) -> list[Score]:
    """Score each corpus on its files, and print each score when it is done. Collective."""
    from run.evaluation import score
    from run.model import DTYPES

    if not corpora:
        return []
    model = trained.load(layout, compute_dtype=DTYPES[settings.precision])
    if layout.is_main:
        print(header(trained, plan, settings), flush=True)
    scores = []
    for corpus, shards in corpora:
        scores.append(score(model, trained, corpus, shards, plan))
        if layout.is_main:
            print(line(scores[-1]), flush=True)
    return scores


def prepare_tasks(settings: EvaluationSettings) -> Any:
    """Return lm-eval's task manager. Raises UsageError, before anything is loaded or exported."""
    from run.tasks import check_tasks, require_harness

    require_harness()
    return check_tasks(names_of(settings.tasks), settings.tasks_path)


def score_tasks(
    settings: EvaluationSettings, trained: TrainedModel, layout: ParallelLayout, plan: Plan, manager: Any
) -> dict[str, Any]:
    """Run the tasks on the Hugging Face folder, or on a temporary export; print and return each task's metrics."""
    from run.export import export_checkpoint
    from run.tasks import run_tasks

    with tempfile.TemporaryDirectory(prefix="colonnade-") as temporary:
        folder = trained.path if trained.is_hugging_face else Path(temporary, "model")
        if not trained.is_hugging_face:
            print(export_checkpoint(trained, layout, folder), flush=True)
        results = run_tasks(
            folder,
            names_of(settings.tasks),
            manager,
            device=str(layout.device),
            precision=settings.precision,
            batch_size=settings.batch_size,
            max_length=plan.block_size,
            prefix=plan.prefix,
            few_shot=settings.few_shot,
            limit=settings.task_limit,
        )
    for task, metrics in results.items():
        shown = [f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)]
        print(f"{task:<16} {', '.join(shown)}")
    return results


def names_of(tasks: str | None) -> list[str]:
    return [task.strip() for task in (tasks or "").split(",") if task.strip()]


def header(trained: TrainedModel, plan: Plan, settings: EvaluationSettings) -> str:
    documents = "a document a file" if plan.concatenate else "a document a row"
    prefix = "first tokens not scored" if plan.prefix is None else f"first tokens after token {plan.prefix}"
    return (
        f"{trained.path}, {settings.precision}: blocks of {plan.block_size}, stride {plan.stride}; {documents}; "
        f"{prefix}\n"
        f"{'data':<16} {'loss':>9} {'perplexity':>11} {'bits/byte':>9} {'tokens':>12} {'bytes':>13} {'documents':>9} "
        f"{'seconds':>8}"
    )


def line(score: Score) -> str:
    """A row of the table, followed by the counts of rows left out, if any."""
    row = (
        f"{score.name:<16} {score.loss:>9.5f} {score.perplexity:>11.3f} {score.bits_per_byte:>9.5f} "
        f"{score.tokens:>12,} {score.bytes:>13,} {score.documents:>9,} {score.seconds:>8.1f}"
    )
    if score.left_out:
        row += "\n  rows left out: " + ", ".join(f"{count:,} {reason}" for reason, count in score.left_out.items())
    return row


def write_report(
    settings: EvaluationSettings, trained: TrainedModel, plan: Plan, scores: list[Score], results: dict[str, Any]
) -> None:
    """Write the --json file, if one was requested."""
    from dataclasses import asdict

    if settings.json is None:
        return
    report = {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "precision": settings.precision,
        "plan": asdict(plan),
        "data": [score.to_dict() for score in scores],
        "tasks": results,
    }
    write_text(settings.json, json.dumps(report, indent=1) + "\n", f"--json {settings.json}")


if __name__ == "__main__":
    launch(main)
