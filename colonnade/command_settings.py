"""Tables of settings for the commands other than `training.py`; most take them in addition to a run's settings.

Nothing heavy is imported, so that `--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from colonnade.run_settings import MAX_STEPS, MAX_TOKENS_PER_STEP, PRECISION_ALIASES, setting, step_setting

_CHECKPOINT = (
    "a run's folder (its newest checkpoint), one checkpoint, a .pth file, {}or wandb:entity/project/name:version"
)


@dataclass(frozen=True)
class ParitySettings:
    """Settings of `check_parity.py`, in addition to the run's own."""

    checkpoint_path: str | None = setting(
        None,
        "parity",
        "a run's folder or one of its checkpoints, to take settings and weights from (default the initial weights "
        "of --seed)",
        unit="PATH",
    )
    steps: int = setting(5, "parity", "number of optimizer steps to compare", minimum=1, maximum=1000, unit="STEPS")
    tolerance: float | None = setting(
        None,
        "parity",
        "largest relative difference allowed in fp32 (default 1e-4; 0 with --deterministic)",
        minimum=0.0,
        maximum=1.0,
    )
    low_precision_tolerance: float | None = setting(
        None,
        "parity",
        "largest difference allowed in a --precision other than fp32, as a multiple of the difference between that "
        "precision and fp32 on one rank in the same step (default 2; 0 with --deterministic)",
        minimum=0.0,
        maximum=100.0,
        unit="FACTOR",
    )
    json: str | None = setting(None, "parity", "also write the comparison to this file, as JSON", unit="FILE")


@dataclass(frozen=True)
class TrainedModelSettings:
    """Which trained model to read, with its sizes and tokenizer: shared by every command that reads one."""

    checkpoint_path: str = setting("", "model", f"{_CHECKPOINT.format('a Hugging Face folder, ')}; required")
    preset: str | None = setting(None, "model", "model sizes for a .pth file: the name of a preset", unit="NAME")
    model_config: str | None = setting(
        None, "model", "model sizes for a .pth file: a Hugging Face config.json", unit="PATH"
    )
    tokenizer_path: str | None = setting(
        None,
        "model",
        "tokenizer, if it is no longer where the run recorded it, or not in the Hugging Face folder; required for a "
        ".pth file",
    )
    trust_remote_code: bool = setting(False, "model", "run Python code shipped with the tokenizer")


@dataclass(frozen=True)
class EvaluationSettings(TrainedModelSettings):
    """Settings of `evaluate.py`."""

    precision: str = setting(
        "fp32", "model", "precision of matrix products", choices=("fp32", "bf16", "fp16"), aliases=PRECISION_ALIASES
    )
    tensor_parallel_size: int | None = setting(
        None,
        "model",
        "ranks that each copy of the model is sharded over; the copies split the windows between them (default all "
        "ranks)",
        minimum=1,
        unit="RANKS",
    )
    data_glob: str | None = setting(
        None, "text", "files to score: comma-separated patterns, or name=glob,... to score each corpus separately"
    )
    text_column: str | None = setting(
        None, "text", "column (key, for JSON lines) that holds the text (default the run's)", unit="NAME"
    )
    concatenate: bool = setting(
        False,
        "text",
        "treat the rows of a file as the lines of one document, as in WikiText (default each row is a document)",
    )
    document_prefix: str = setting(
        "trained",
        "text",
        "what a document's first token is predicted from: token (BOS, or EOS), none (it is not scored and its bytes "
        "do not count), or trained (whichever the run was trained with; of a Hugging Face folder, what its tokenizer "
        "puts before a text)",
        choices=("trained", "token", "none"),
    )
    block_size: int | None = setting(
        None,
        "text",
        "tokens per window, the model's input (default the run's --block-size, else the model's context)",
        minimum=1,
        unit="TOKENS",
    )
    stride: int | None = setting(
        None,
        "text",
        "tokens between the starts of consecutive windows (default half of --block-size)",
        minimum=1,
        unit="TOKENS",
    )
    batch_size: int = setting(8, "text", "windows per forward pass", minimum=1, maximum=4096, unit="WINDOWS")
    max_documents: int | None = setting(
        None, "text", "stop after this many documents of each corpus", minimum=1, unit="COUNT"
    )
    max_tokens: int | None = setting(
        None,
        "text",
        "stop after the document (with --concatenate, the 64 KiB piece of text) with which a corpus reaches this "
        "many tokens",
        minimum=1,
        unit="TOKENS",
    )
    tasks: str | None = setting(
        None, "tasks", "comma-separated names of lm-eval tasks; needs one rank and pip install 'colonnade[eval]'"
    )
    tasks_path: str | None = setting(None, "tasks", "folder with YAML files that define your own tasks", unit="DIR")
    few_shot: int | None = setting(
        None, "tasks", "few-shot examples per question (default the task's own number)", minimum=0, unit="COUNT"
    )
    task_limit: int | None = setting(
        None, "tasks", "number of questions to use from each task (default all)", minimum=1, unit="COUNT"
    )
    json: str | None = setting(None, "results", "also write the results to this file, as JSON", unit="FILE")


@dataclass(frozen=True)
class ResumeSettings:
    """Settings of `resume_pretrain_tensor.py`, in addition to the run's own."""

    checkpoint_path: str = setting("", "resuming", f"{_CHECKPOINT.format('')}; required")
    rewarmup_steps: int = step_setting(
        100, "resuming", "steps of linear warm-up after the optimizer is reset; 0 for none", minimum=0
    )
    keep_optimizer: bool = setting(
        False, "resuming", "keep the optimizer state and do not warm up again: resume exactly"
    )
    allow_data_change: bool = setting(
        False,
        "resuming",
        "resume even if data, tokenizer or block size differ from the checkpoint's, and record the change",
    )


@dataclass(frozen=True)
class PlanSettings:
    """Settings of `plan_run.py`, in addition to those of the run it plans."""

    gpus: int = setting(
        1, "planning", "number of devices, with one rank on each", minimum=1, maximum=2**20, unit="COUNT"
    )
    gpu: str | None = setting(
        None,
        "planning",
        "device type, such as H100 or 'A100 80GB', which determines memory and peak FLOP/s (default both unknown)",
        unit="NAME",
    )
    gpu_memory_gib: float | None = setting(
        None,
        "planning",
        "memory of the --gpu device in GiB (default its known value)",
        above=0.0,
        maximum=2**20,
        unit="GIB",
    )
    gpu_tflops: float | None = setting(
        None,
        "planning",
        "dense peak of the --gpu device in TFLOP/s, in the run's precision (default its known value)",
        above=0.0,
        maximum=2**30,
        unit="TFLOPS",
    )
    tokens: int | None = setting(
        None,
        "planning",
        "tokens to train on (default --tokens-per-parameter times the parameters)",
        minimum=1,
        maximum=MAX_STEPS * MAX_TOKENS_PER_STEP,
        unit="TOKENS",
    )
    tokens_per_parameter: float = setting(
        22.0,
        "planning",
        "training tokens per parameter, embeddings included, if neither --tokens nor --total-steps is given",
        above=0.0,
    )
    total_steps: int | None = setting(
        None, "planning", "optimizer steps of the run, instead of --tokens", minimum=1, maximum=MAX_STEPS, unit="STEPS"
    )
    micro_batch_size: int | None = setting(
        None,
        "planning",
        "sequences per micro-batch on each rank (default: that of the recommended candidate; without --gpu the "
        "preset's)",
        minimum=1,
        maximum=2**16,
        unit="COUNT",
    )
    utilisation: float = setting(
        0.4,
        "planning",
        "fraction of the devices' peak that computation is assumed to reach, not counting communication",
        above=0.0,
        maximum=1.0,
    )
    # NCCL's protocol takes about a fifth of NVLink: rings reach 370 of NVLink 4's 450 GB/s (NVIDIA/nccl-tests, issue
    # 212). Over InfiniBand they reach somewhat more.
    link_utilisation: float = setting(
        0.8,
        "planning",
        "part of the links' rate that collectives are assumed to reach; 1 if you give measured rates",
        above=0.0,
        maximum=1.0,
    )
    interconnect: str | None = setting(
        None,
        "planning",
        "link between the devices of a node, such as nvlink4 or pcie5, or its GB/s in one direction (default that "
        "of --gpu)",
        unit="LINK",
    )
    network: str = setting(
        "infiniband-ndr",
        "planning",
        "link between nodes, such as infiniband-ndr or ethernet-100g, or its GB/s per device in one direction",
        unit="LINK",
    )
    gpus_per_node: int = setting(8, "planning", "devices per node", minimum=1, maximum=2**20, unit="COUNT")
    vocab_size: int | None = setting(
        None,
        "planning",
        "vocabulary size, if neither the model's config nor a tokenizer gives it",
        minimum=1,
        maximum=2**31 - 1,
        unit="ENTRIES",
    )
    count_parameters: bool = setting(False, "planning", "only print the table of parameters by module")
    json: bool = setting(False, "planning", "print the results as one JSON object")
    output: str = setting("run.yaml", "planning", "settings file to write, for training.py --config", unit="YAML")
    write: bool = setting(True, "planning", "write the --output file")
    force: bool = setting(False, "planning", "overwrite the --output file if it exists")
