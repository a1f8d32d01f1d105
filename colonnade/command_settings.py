"""The tables of what `evaluate.py` and `check_parity.py` are told beside a run's settings; flags are made from them.

Nothing heavy is imported, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from colonnade.run_settings import _setting


@dataclass(frozen=True)
class ParitySettings:
    """What `check_parity.py` is told beside the run's own settings."""

    checkpoint_path: str | None = _setting(
        None,
        "parity",
        "a run's folder or one of its checkpoints: its settings and its weights (default weights of the seed)",
        unit="PATH",
    )
    steps: int = _setting(5, "parity", "optimizer steps to compare", minimum=1, maximum=1000, unit="STEPS")
    tolerance: float | None = _setting(
        None,
        "parity",
        "relative difference allowed in fp32 (default 1e-4; with --deterministic 0)",
        minimum=0.0,
        maximum=1.0,
    )
    low_precision_tolerance: float | None = _setting(
        None,
        "parity",
        "difference allowed in the run's --precision where that is another, as a multiple of what it differs from fp32 "
        "by on one rank in the same step (default 2; with --deterministic 0)",
        minimum=0.0,
        maximum=100.0,
        unit="FACTOR",
    )
    json: str | None = _setting(None, "parity", "write the comparison to this file as well", unit="FILE")


@dataclass(frozen=True)
class EvaluationSettings:
    """What `evaluate.py` is told."""

    checkpoint_path: str = _setting("", "model", "a run's folder, one of its checkpoints, or a .pth file; required")
    preset: str | None = _setting(None, "model", "sizes of a .pth file, by name", unit="NAME")
    model_config: str | None = _setting(None, "model", "sizes of a .pth file, as a config.json", unit="PATH")
    tokenizer_path: str | None = _setting(None, "model", "where the run's tokenizer is now, if it was moved")
    trust_remote_code: bool = _setting(False, "model", "run code that comes with the tokenizer")
    precision: str = _setting("fp32", "model", "of matrix products", choices=("fp32", "bf16", "fp16"))
    tensor_parallel_size: int | None = _setting(
        None,
        "model",
        "ranks one model is cut over, the others share out windows (default all)",
        minimum=1,
        unit="RANKS",
    )
    data_glob: str | None = _setting(
        None, "text", "files to score: patterns separated by commas, or name=glob,... for a line each"
    )
    text_column: str | None = _setting(
        None, "text", "column (JSON lines: key) that holds the text (default the run's)", unit="NAME"
    )
    concatenate: bool = _setting(
        False, "text", "the rows of a file are the lines of one document, as in WikiText (default each is a document)"
    )
    document_prefix: str = _setting(
        "trained",
        "text",
        "what a document's first token is predicted from: a BOS or EOS token, none (then it is not scored, and its "
        "bytes do not count), or what the run was trained with",
        choices=("trained", "token", "none"),
    )
    block_size: int | None = _setting(
        None, "text", "tokens the model is given at once (default the run's block)", minimum=1, unit="TOKENS"
    )
    stride: int | None = _setting(
        None, "text", "tokens between the beginnings of two windows (default half a block)", minimum=1, unit="TOKENS"
    )
    batch_size: int = _setting(8, "text", "windows computed at once", minimum=1, maximum=4096, unit="WINDOWS")
    max_documents: int | None = _setting(
        None, "text", "stop after so many documents of a corpus", minimum=1, unit="COUNT"
    )
    max_tokens: int | None = _setting(
        None,
        "text",
        "stop after the document (with --concatenate: the 64 KiB of text) that brings a corpus to so many tokens",
        minimum=1,
        unit="TOKENS",
    )
    tasks: str | None = _setting(
        None, "tasks", "tasks of lm-eval by name, separated by commas; on one rank, with pip install 'colonnade[eval]'"
    )
    tasks_path: str | None = _setting(None, "tasks", "folder with the YAML files of tasks of your own", unit="DIR")
    few_shot: int | None = _setting(
        None, "tasks", "examples before each question (default as the task says)", minimum=0, unit="COUNT"
    )
    task_limit: int | None = _setting(None, "tasks", "questions of each task (default all)", minimum=1, unit="COUNT")
    json: str | None = _setting(None, "results", "write the results to this file as well", unit="FILE")
