"""Tables of settings for the commands other than `training.py`; most take them in addition to a run's settings.

Nothing heavy is imported, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from colonnade.run_settings import MAX_STEPS, MAX_TOKENS_PER_STEP, PRECISION_ALIASES, setting, step_setting

_CHECKPOINT = "a run's folder, one of its checkpoints, a .pth file, or wandb:entity/project/name:version; required"


@dataclass(frozen=True)
class ParitySettings:
    """Settings of `check_parity.py`, in addition to the run's own."""

    checkpoint_path: str | None = setting(
        None,
        "parity",
        "a run's folder or one of its checkpoints: its settings and its weights (default weights of the seed)",
        unit="PATH",
    )
    steps: int = setting(5, "parity", "optimizer steps to compare", minimum=1, maximum=1000, unit="STEPS")
    tolerance: float | None = setting(
        None,
        "parity",
        "relative difference allowed in fp32 (default 1e-4; with --deterministic 0)",
        minimum=0.0,
        maximum=1.0,
    )
    low_precision_tolerance: float | None = setting(
        None,
        "parity",
        "difference allowed in the run's --precision where that is another, as a multiple of what it differs from fp32 "
        "by on one rank in the same step (default 2; with --deterministic 0)",
        minimum=0.0,
        maximum=100.0,
        unit="FACTOR",
    )
    json: str | None = setting(None, "parity", "write the comparison to this file as well", unit="FILE")


@dataclass(frozen=True)
class TrainedModelSettings:
    """Which trained model to read, with its sizes and tokenizer: shared by every command that reads one."""

    checkpoint_path: str = setting("", "model", _CHECKPOINT)
    preset: str | None = setting(None, "model", "sizes of a .pth file, by name", unit="NAME")
    model_config: str | None = setting(
        None, "model", "sizes of a .pth file, as a Hugging Face config.json", unit="PATH"
    )
    tokenizer_path: str | None = setting(
        None, "model", "where the run's tokenizer is now, if it was moved; a .pth file needs it"
    )
    trust_remote_code: bool = setting(False, "model", "run code that comes with the tokenizer")


@dataclass(frozen=True)
class EvaluationSettings(TrainedModelSettings):
    """Settings of `evaluate.py`."""

    precision: str = setting(
        "fp32", "model", "of matrix products", choices=("fp32", "bf16", "fp16"), aliases=PRECISION_ALIASES
    )
    tensor_parallel_size: int | None = setting(
        None,
        "model",
        "ranks one model is cut over, the others share out windows (default all)",
        minimum=1,
        unit="RANKS",
    )
    data_glob: str | None = setting(
        None, "text", "files to score: patterns separated by commas, or name=glob,... for a line each"
    )
    text_column: str | None = setting(
        None, "text", "column (JSON lines: key) that holds the text (default the run's)", unit="NAME"
    )
    concatenate: bool = setting(
        False, "text", "the rows of a file are the lines of one document, as in WikiText (default each is a document)"
    )
    document_prefix: str = setting(
        "trained",
        "text",
        "what a document's first token is predicted from: a BOS or EOS token, none (then it is not scored, and its "
        "bytes do not count), or what the run was trained with",
        choices=("trained", "token", "none"),
    )
    block_size: int | None = setting(
        None, "text", "tokens the model is given at once (default the run's block)", minimum=1, unit="TOKENS"
    )
    stride: int | None = setting(
        None, "text", "tokens between the beginnings of two windows (default half a block)", minimum=1, unit="TOKENS"
    )
    batch_size: int = setting(8, "text", "windows computed at once", minimum=1, maximum=4096, unit="WINDOWS")
    max_documents: int | None = setting(
        None, "text", "stop after so many documents of a corpus", minimum=1, unit="COUNT"
    )
    max_tokens: int | None = setting(
        None,
        "text",
        "stop after the document (with --concatenate: the 64 KiB of text) that brings a corpus to so many tokens",
        minimum=1,
        unit="TOKENS",
    )
    tasks: str | None = setting(
        None, "tasks", "tasks of lm-eval by name, separated by commas; on one rank, with pip install 'colonnade[eval]'"
    )
    tasks_path: str | None = setting(None, "tasks", "folder with the YAML files of tasks of your own", unit="DIR")
    few_shot: int | None = setting(
        None, "tasks", "examples before each question (default as the task says)", minimum=0, unit="COUNT"
    )
    task_limit: int | None = setting(None, "tasks", "questions of each task (default all)", minimum=1, unit="COUNT")
    json: str | None = setting(None, "results", "write the results to this file as well", unit="FILE")


@dataclass(frozen=True)
class ResumeSettings:
    """Settings of `resume_pretrain_tensor.py`, in addition to the run's own."""

    checkpoint_path: str = setting("", "resuming", _CHECKPOINT)
    rewarmup_steps: int = step_setting(
        100, "resuming", "steps of linear warm-up from here, after the optimizer is reset; 0 for none", minimum=0
    )
    keep_optimizer: bool = setting(False, "resuming", "go on exactly: optimizer state kept, no warm-up again")
    allow_data_change: bool = setting(
        False, "resuming", "go on where data, tokenizer or block size are others than the checkpoint's, and record it"
    )


@dataclass(frozen=True)
class PlanSettings:
    """Settings of `plan_run.py`, in addition to those of the run it plans."""

    gpus: int = setting(1, "planning", "devices, one rank each", minimum=1, maximum=2**20, unit="COUNT")
    gpu: str | None = setting(
        None,
        "planning",
        "device, as H100 or A100 80GB: its memory and peak are known (default neither is)",
        unit="NAME",
    )
    gpu_memory_gib: float | None = setting(
        None, "planning", "memory of a device named by --gpu (default as known)", above=0.0, maximum=2**20, unit="GIB"
    )
    gpu_tflops: float | None = setting(
        None,
        "planning",
        "peak of a device named by --gpu, dense, in the run's precision (default as known)",
        above=0.0,
        maximum=2**30,
        unit="TFLOPS",
    )
    tokens: int | None = setting(
        None, "planning", "tokens to train on", minimum=1, maximum=MAX_STEPS * MAX_TOKENS_PER_STEP, unit="TOKENS"
    )
    tokens_per_parameter: float = setting(
        22.0, "planning", "tokens for each parameter, embeddings included, where --tokens is not given", above=0.0
    )
    micro_batch_size: int | None = setting(
        None,
        "planning",
        "sequences a rank computes at once (default the most that fit, where the memory is known)",
        minimum=1,
        maximum=2**16,
        unit="COUNT",
    )
    utilisation: float = setting(
        0.4,
        "planning",
        "part of the devices' peak that computation is assumed to reach, communication left out",
        above=0.0,
        maximum=1.0,
    )
    interconnect: str | None = setting(
        None,
        "planning",
        "link between the devices of a node, as nvlink4 or pcie5, or GB/s in one direction (default the device's)",
        unit="LINK",
    )
    network: str = setting(
        "infiniband-ndr",
        "planning",
        "link between nodes, as infiniband-ndr or ethernet-100g, or GB/s a device in one direction",
        unit="LINK",
    )
    gpus_per_node: int = setting(8, "planning", "devices of a node", minimum=1, maximum=2**20, unit="COUNT")
    vocab_size: int | None = setting(
        None,
        "planning",
        "entries of the vocabulary, where neither the model's config nor a tokenizer tells",
        minimum=1,
        maximum=2**31 - 1,
        unit="ENTRIES",
    )
    count_parameters: bool = setting(False, "planning", "print the table of parameters by module, and nothing else")
    json: bool = setting(False, "planning", "print one JSON object")
    output: str = setting("run.yaml", "planning", "file for training.py --config", unit="YAML")
    write: bool = setting(True, "planning", "write that file")
    force: bool = setting(False, "planning", "replace the file if it is there")
