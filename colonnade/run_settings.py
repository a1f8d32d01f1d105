"""The table of run settings: each field its default, limits, group and help text. Flags and YAML are made from it.

Nothing heavy is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from typing import Any

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
TOKENIZER_BACKENDS = ("auto", "hf", "fastokens")
CHECKPOINT_MODES = ("async", "sync")
MAX_STEPS = 10**9
# Four times the largest batches published; a step's tokens are in memory several times over while they are read ahead.
MAX_TOKENS_PER_STEP = 2**28


def _setting(default: Any, group: str, text: str, **extra: Any) -> Any:
    """A field with its help text. `identity` marks what makes two runs different runs; `unit` is the flag's metavar."""
    return field(default=default, metadata={"group": group, "help": text, **extra})


def _identity(default: Any, group: str, text: str, **extra: Any) -> Any:
    return _setting(default, group, text, identity=True, **extra)


def _steps(default: int | None, group: str, text: str, **extra: Any) -> Any:
    return _setting(default, group, text, unit="STEPS", maximum=MAX_STEPS, **extra)


@dataclass(frozen=True)
class RunSettings:
    """Everything a run can be told. Units and the value that switches a thing off stand in each help text."""

    # Model
    preset: str | None = _setting(
        None, "model", "model size, a file name in presets/ (default argonne-2b; on the CPU tiny)", unit="NAME"
    )
    model_config: str | None = _setting(
        None, "model", "Hugging Face config.json (or its folder) instead of a preset", unit="PATH"
    )
    init_from: str | None = _identity(
        None,
        "model",
        "Hugging Face folder whose weights a fresh run begins with, instead of random ones; architecture and tokenizer "
        "are its own unless given",
        unit="PATH",
    )

    # Data
    data_glob: str | None = _setting(
        None,
        "data",
        "shards to train on: paths, patterns or URLs, separated by commas, or name=glob:weight,... for a mixture "
        "(default those in data/)",
    )
    text_column: str = _identity("text", "data", "column (JSON lines: key) that holds the text", unit="NAME")
    tokenizer_path: str | None = _setting(None, "data", "tokenizer: a folder or a hub name")
    tokenizer_backend: str = _setting(
        "auto",
        "data",
        "library that encodes: hf (tokenizers) or fastokens, which is faster; auto is fastokens where it is installed "
        "and has given the same ids",
        choices=TOKENIZER_BACKENDS,
    )
    trust_remote_code: bool = _setting(False, "data", "run code that comes with the tokenizer")
    add_document_boundary_tokens: bool = _identity(False, "data", "put BOS and EOS around each document")
    shuffle: bool = _identity(
        True, "data", "read row groups, and the rows of each, in an order of the seed, another one every epoch"
    )
    data_lanes: int | None = _setting(
        None,
        "data",
        "lanes V the data is read in, fixed when the run begins; a dp that divides V shares them out (default from the "
        "number and size of row groups, up to 48)",
        minimum=1,
        maximum=4096,
        unit="LANES",
    )
    packing: str = _identity(
        "concat",
        "data",
        "how documents fill blocks: laid end to end and cut, or whole ones that fit best",
        choices=("concat", "best-fit"),
    )
    document_mask: bool = _identity(
        False, "data", "attention stays within a document, positions restart with each, and no target crosses over"
    )
    strict_data: bool = _setting(
        False, "data", "stop at a damaged file or row group instead of skipping and recording it"
    )
    validation_glob: str | None = _setting(None, "data", "shards to validate on; without it there is no validation")
    validation_interval: int = _steps(250, "data", "steps between validations; 0 for only one at the end", minimum=0)
    validation_chunks: int = _setting(
        64, "data", "blocks of the validation shards that are evaluated; 0 for all of them", minimum=0, unit="BLOCKS"
    )

    # Batch
    block_size: int | None = _identity(
        None, "batch", "tokens a sequence (default the model's context)", minimum=1, unit="TOKENS"
    )
    initial_batch_size: str = _setting(
        "auto", "batch", "sequences a micro-batch: a number, lowered where it does not fit, or auto for the largest"
    )
    gradient_accumulation_steps: int = _setting(
        1,
        "batch",
        "micro-batches an optimizer step, on each rank",
        minimum=1,
        maximum=MAX_TOKENS_PER_STEP,
        unit="COUNT",
    )
    tokens_per_step: int | None = _setting(
        None,
        "batch",
        "tokens an optimizer step over all ranks; accumulation then follows (default: it follows from accumulation)",
        minimum=1,
        maximum=MAX_TOKENS_PER_STEP,
        unit="TOKENS",
    )
    memory_limit_gib: float | None = _setting(
        None,
        "batch",
        "GiB a rank may use when the micro-batch is tuned on the CPU (default free memory / ranks)",
        above=0.0,
        maximum=2.0**20,
    )

    # Optimization
    total_steps: int = _identity(
        1000, "optimization", "optimizer steps of the run", minimum=1, maximum=MAX_STEPS, unit="STEPS"
    )
    learning_rate: float = _identity(3e-4, "optimization", "peak learning rate", above=0.0, maximum=10.0)
    min_learning_rate: float | None = _identity(
        None, "optimization", "learning rate at the end of the cosine (default a tenth of the peak)", minimum=0.0
    )
    warmup_steps: int = _identity(
        100, "optimization", "steps of linear warm-up; 0 for none", minimum=0, maximum=MAX_STEPS, unit="STEPS"
    )
    weight_decay: float = _identity(
        0.1, "optimization", "AdamW weight decay, not on norms and biases; 0 for none", minimum=0.0
    )
    adam_beta1: float = _identity(0.9, "optimization", "decay of AdamW's first moment", minimum=0.0, below=1.0)
    adam_beta2: float = _identity(0.95, "optimization", "decay of AdamW's second moment", minimum=0.0, below=1.0)
    max_grad_norm: float = _identity(
        1.0, "optimization", "global gradient norm that gradients are clipped to; 0 for no clipping", minimum=0.0
    )
    max_skipped_steps: int = _setting(
        10,
        "optimization",
        "steps in a row that may be skipped (loss or gradient norm not finite, or a spike) before the run stops",
        minimum=1,
        maximum=MAX_STEPS,
        unit="STEPS",
    )
    spike_sigma: float = _setting(
        0.0,
        "optimization",
        "a loss this many standard deviations above the mean of the last ones is a spike; 0 for no spikes",
        minimum=0.0,
        unit="S",
    )
    spike_window: int = _setting(
        100,
        "optimization",
        "losses that a spike is measured against: the last ones that were not skipped; at least half of them",
        minimum=10,
        maximum=10_000,
        unit="STEPS",
    )
    spike_action: str = _setting(
        "warn",
        "optimization",
        "what a spike causes: a line, or that the step is skipped; then these three are fixed for a run",
        choices=("warn", "skip"),
    )
    seed: int = _identity(
        1337, "optimization", "seed of the initial weights and of the order of the data", minimum=0, maximum=2**63 - 1
    )

    # Execution
    precision: str = _identity(
        "auto",
        "execution",
        "of matrix products; auto is bf16 on accelerators that have it, else fp32",
        choices=PRECISIONS,
    )
    tensor_parallel_size: int | None = _setting(
        None,
        "execution",
        "ranks one model is cut over, the others are data-parallel (default all)",
        minimum=1,
        unit="RANKS",
    )
    tensor_slices: int | None = _identity(
        None,
        "execution",
        "slices V summed in a fixed order: a step has the same bits at any tp that divides V (default one a rank, any "
        "order; with --deterministic 8, or the largest power of two below that the sizes allow)",
        minimum=1,
    )
    deterministic: bool = _identity(
        False,
        "execution",
        "the same bits at any tp that divides the slices and any dp that halves the batch; one CPU thread a rank",
    )
    replicate_embeddings: bool = _setting(False, "execution", "keep embedding and head whole on every rank")
    disable_gradient_checkpointing: bool = _setting(
        False, "execution", "keep all activations instead of computing them again in the backward pass"
    )
    compile: bool = _setting(False, "execution", "compile the segments on the CPU too (default on accelerators)")
    disable_compile: bool = _setting(False, "execution", "run eagerly on accelerators too")

    # Checkpoints and logs
    checkpoint_dir: str = _setting("pretrained", "checkpoints and logs", "folder of the run")
    checkpoint_interval: int = _steps(
        350, "checkpoints and logs", "steps between checkpoints; 0 for only one at the end", minimum=0
    )
    keep_checkpoints: int = _setting(
        50, "checkpoints and logs", "newest checkpoints kept; 0 for all", minimum=0, unit="COUNT"
    )
    keep_every: int = _steps(
        0,
        "checkpoints and logs",
        "checkpoints at multiples of so many steps stay for good, and are not among the newest kept; 0 for none",
        minimum=0,
    )
    checkpoint_mode: str = _setting(
        "async",
        "checkpoints and logs",
        "async writes a copy while training goes on, sync waits until it is written",
        choices=CHECKPOINT_MODES,
    )
    checkpoint_hash: bool = _setting(
        True, "checkpoints and logs", "record the SHA-256 of checkpoint files, and compare it before going on from them"
    )
    log_interval: int = _steps(10, "checkpoints and logs", "steps between log lines", minimum=1)
    fingerprint_interval: int | None = _steps(
        None,
        "checkpoints and logs",
        "steps between fingerprints of parameters and moments; 0 for none; with --deterministic (default 100, else "
        "none) also one at each checkpoint",
        minimum=0,
    )
    drift_check_interval: int = _steps(
        0,
        "checkpoints and logs",
        "steps between comparisons of parameters that several ranks hold; 0 for only those before each checkpoint",
        minimum=0,
    )

    # Samples
    sample_interval: int = _steps(
        0,
        "samples",
        "step of the first samples of the model's text; the next come after twice as many, and so on, and at the end; "
        "0 for none",
        minimum=0,
    )
    sample_prompts: str | None = _setting(
        None, "samples", "prompts that are continued: one a line, or in a .jsonl file one object a line", unit="FILE"
    )
    sample_tokens: int = _setting(
        64, "samples", "most tokens that are added to a prompt", minimum=1, maximum=2**20, unit="TOKENS"
    )
    sample_temperature: float = _setting(
        0.8, "samples", "temperature they are drawn at; 0 for the likeliest token each time", minimum=0.0
    )

    # Stopping and hangs
    wall_time: str | None = _setting(
        None,
        "stopping and hangs",
        "time since the launch, as [DAYS-]HH:MM:SS, by which the run has saved and stopped (default no limit)",
        unit="TIME",
    )
    startup_timeout: float = _setting(
        1800.0,
        "stopping and hangs",
        "seconds that ranks wait for each other until the first step is done, and in validations and saves; 0 for ever",
        minimum=0.0,
        unit="SECONDS",
    )
    step_timeout: float = _setting(
        600.0,
        "stopping and hangs",
        "seconds that a later step, or waiting for its data, may take before the run is taken for hung; 0 for ever",
        minimum=0.0,
        unit="SECONDS",
    )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """The settings that two starts of one run must share; those of spikes only where spikes skip steps."""
        names = [f.name for f in fields(self) if f.metadata.get("identity")]
        if self.spike_sigma > 0 and self.spike_action == "skip":
            names += ["spike_sigma", "spike_window", "spike_action"]
        return {name: getattr(self, name) for name in names}

    def replace(self, **changes: Any) -> RunSettings:
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class ResumeSettings:
    """What `resume_pretrain_tensor.py` is told beside the run's own settings."""

    checkpoint_path: str = _setting("", "resuming", "a run's folder, one of its checkpoints, or a .pth file; required")
    rewarmup_steps: int = _steps(
        100, "resuming", "steps of linear warm-up from here, after the optimizer is reset; 0 for none", minimum=0
    )
    keep_optimizer: bool = _setting(False, "resuming", "go on exactly: optimizer state kept, no warm-up again")
    allow_data_change: bool = _setting(
        False, "resuming", "go on where data, tokenizer or block size are others than the checkpoint's, and record it"
    )
