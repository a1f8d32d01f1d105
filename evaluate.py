"""Loss, perplexity and bits a byte of a trained checkpoint on text, at any number of ranks.

    python evaluate.py --checkpoint-path pretrained --data-glob 'held_out/*.parquet'
    torchrun --nproc_per_node=2 evaluate.py --checkpoint-path pretrained \
      --data-glob 'web=web/*.parquet,code=code/*.jsonl' --json scores.json

Every token is scored once (`docs/evaluation.md`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from colonnade.command_settings import EvaluationSettings
from colonnade.flags import parse_evaluation
from colonnade.parallel.launch import launch

if TYPE_CHECKING:
    from run_evaluation import Plan, Score
    from trained_model import TrainedModel


def main(arguments: list[str] | None = None) -> None:
    settings = parse_evaluation(arguments)
    # torch takes seconds to import: not before the flags have been found right.
    from colonnade.parallel.mesh import init_parallel
    from colonnade.parallel.vote import on_first_rank, vote
    from run_assembly import DTYPES
    from run_evaluation import corpora_of, plan_of, score
    from trained_model import open_trained

    layout = init_parallel(settings.tensor_parallel_size)
    trained = open_trained(
        Path(settings.checkpoint_path),
        tokenizer_path=settings.tokenizer_path,
        preset=settings.preset,
        model_config=settings.model_config,
        trust_remote_code=settings.trust_remote_code,
    )
    with vote():
        plan = plan_of(settings, trained)
        corpora = corpora_of(settings.data_glob or "")
    model = trained.load(layout, compute_dtype=DTYPES[settings.precision])
    scores = []
    if layout.is_main:
        print(header(trained, plan, settings), flush=True)
    for corpus in corpora:
        scores.append(score(model, trained, corpus, plan))
        if layout.is_main:
            print(line(scores[-1]), flush=True)
    on_first_rank(lambda: write_report(settings, trained, plan, scores))


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
    """A row of the table, and what was left out."""
    row = (
        f"{score.name:<16} {score.loss:>9.5f} {score.perplexity:>11.3f} {score.bits_per_byte:>9.5f} "
        f"{score.tokens:>12,} {score.bytes:>13,} {score.documents:>9,} {score.seconds:>8.1f}"
    )
    if score.left_out:
        row += "\n  rows left out: " + ", ".join(f"{count:,} {reason}" for reason, count in score.left_out.items())
    return row


def write_report(settings: EvaluationSettings, trained: TrainedModel, plan: Plan, scores: list[Score]) -> None:
    """Write --json, if it was asked for."""
    from dataclasses import asdict

    if settings.json is None:
        return
    report = {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "precision": settings.precision,
        "plan": asdict(plan),
        "data": [score.to_dict() for score in scores],
    }
    Path(settings.json).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    launch(main)
