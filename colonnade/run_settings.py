"""The table of run settings: a default, limits, group and help text per field. Flags and YAML keys derive from it.

Nothing heavy is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from typing import Any

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
TOKENIZER_BACKENDS = ("auto", "hf", "fastokens")
CHECKPOINT_MODES = ("async", "sync")
SCHEDULES = ("cosine", "wsd", "constant")
CHECKPOINTING = ("none", "selective", "full")
DECAY_SHAPES = ("1-sqrt", "linear", "cosine")
OPTIMIZERS = ("adamw", "muon")
DATA_PARALLEL_SHARDS = ("none", "zero2", "zero3")
MAX_STEPS = 10**9
# Four times the largest published batches. Reading ahead holds several copies of a step's tokens in memory.
MAX_TOKENS_PER_STEP = 2**28


def setting(default: Any, group: str, text: str, **extra: Any) -> Any:
    """A field with its help text.

    `identity` marks a setting whose change makes it a different run; `unit` is the flag's metavar; `only_with` names
    another field and the values it must have for this one to take effect.
    """
    return field(default=default, metadata={"group": group, "help": text, **extra})


def identity_setting(default: Any, group: str, text: str, **extra: Any) -> Any:
    return setting(default, group, text, identity=True, **extra)


def step_setting(default: int | None, group: str, text: str, **extra: Any) -> Any:
    return setting(default, group, text, unit="STEPS", maximum=MAX_STEPS, **extra)


@dataclass(frozen=True)
class RunSettings:
    """All settings of a run. Each help text gives the unit, and the value that turns the feature off."""

    # Model
    preset: str | None = setting(
        None, "model", "model size, a file name in presets/ (default argonne-2b; on the CPU tiny)", unit="NAME"
    )
    model_config: str | None = setting(
        None, "model", "Hugging Face config.json (or its folder) instead of a preset", unit="PATH"
    )
    init_from: str | None = identity_setting(
        None,
        "model",
        "Hugging Face folder whose weights a fresh run begins with, instead of random ones; architecture and tokenizer "
        "are its own unless given",
        unit="PATH",
    )

    # Data
    data_glob: str | None = setting(
        None,
        "data",
        "shards to train on: paths, patterns or URLs, separated by commas, or name=glob:weight,... for a mixture "
        "(default those in data/)",
    )
    text_column: str = identity_setting("text", "data", "column (JSON lines: key) that holds the text", unit="NAME")
    tokenizer_path: str | None = setting(None, "data", "tokenizer: a folder or a hub name")
    tokenizer_backend: str = setting(
        "auto",
        "data",
        "library that encodes: hf (tokenizers) or fastokens, which is faster; auto is fastokens where it is installed "
        "and has given the same ids",
        choices=TOKENIZER_BACKENDS,
    )
    trust_remote_code: bool = setting(False, "data", "run code that comes with the tokenizer")
    add_document_boundary_tokens: bool = identity_setting(False, "data", "put BOS and EOS around each document")
    shuffle: bool = identity_setting(
        True, "data", "read row groups, and the rows of each, in an order of the seed, another one every epoch"
    )
    data_lanes: int | None = setting(
        None,
        "data",
        "lanes V the data is read in, fixed when the run begins; a dp that divides V shares them out (default from the "
        "number and size of row groups, up to 48)",
        minimum=1,
        maximum=4096,
        unit="LANES",
    )
    packing: str = identity_setting(
        "concat",
        "data",
        "how documents fill blocks: laid end to end and cut, or whole ones that fit best",
        choices=("concat", "best-fit"),
    )
    document_mask: bool = identity_setting(
        False, "data", "attention stays within a document, positions restart with each, and no target crosses over"
    )
    strict_data: bool = setting(
        False, "data", "stop at a damaged file or row group instead of skipping and recording it"
    )
    validation_glob: str | None = setting(None, "data", "shards to validate on; without it there is no validation")
    validation_interval: int = step_setting(
        250, "data", "steps between validations; 0 for only one at the end", minimum=0
    )
    validation_chunks: int = setting(
        64, "data", "blocks of the validation shards that are evaluated; 0 for all of them", minimum=0, unit="BLOCKS"
    )

    # Batch
    block_size: int | None = identity_setting(
        None, "batch", "tokens a sequence (default the model's context)", minimum=1, unit="TOKENS"
    )
    initial_batch_size: str = setting(
        "auto", "batch", "sequences a micro-batch: a number, lowered where it does not fit, or auto for the largest"
    )
    gradient_accumulation_steps: int = setting(
        1,
        "batch",
        "micro-batches an optimizer step, on each rank",
        minimum=1,
        maximum=MAX_TOKENS_PER_STEP,
        unit="COUNT",
    )
    tokens_per_step: int | None = setting(
        None,
        "batch",
        "tokens an optimizer step over all ranks; accumulation then follows (default: it follows from accumulation)",
        minimum=1,
        maximum=MAX_TOKENS_PER_STEP,
        unit="TOKENS",
    )
    memory_limit_gib: float | None = setting(
        None,
        "batch",
        "GiB a rank may use when the micro-batch is tuned (default free memory / ranks; 0.95 of a GPU's)",
        above=0.0,
        maximum=2.0**20,
    )

    # Optimization
    total_steps: int = identity_setting(
        1000, "optimization", "optimizer steps of the run", minimum=1, maximum=MAX_STEPS, unit="STEPS"
    )
    learning_rate: float = identity_setting(3e-4, "optimization", "peak learning rate", above=0.0, maximum=10.0)
    min_learning_rate: float | None = identity_setting(
        None,
        "optimization",
        "learning rate at the end of the schedule (default a tenth of the peak)",
        minimum=0.0,
        only_with=("schedule", ("cosine", "wsd")),
    )
    schedule: str = identity_setting(
        "cosine",
        "optimization",
        "after the warm-up: a cosine down to the horizon, wsd (stable, then a decay before the horizon), or constant",
        choices=SCHEDULES,
    )
    schedule_steps: int | None = identity_setting(
        None,
        "optimization",
        "horizon of the schedule: where the learning rate has come down (default --total-steps)",
        minimum=1,
        maximum=MAX_STEPS,
        unit="STEPS",
        only_with=("schedule", ("cosine", "wsd")),
    )
    decay_steps: int | None = identity_setting(
        None,
        "optimization",
        "steps of the decay of wsd, the last ones before the horizon (default a tenth of them)",
        minimum=1,
        maximum=MAX_STEPS,
        unit="STEPS",
        only_with=("schedule", ("wsd",)),
    )
    decay_shape: str = identity_setting(
        "1-sqrt",
        "optimization",
        "how wsd decays over its last steps",
        choices=DECAY_SHAPES,
        only_with=("schedule", ("wsd",)),
    )
    warmup_steps: int = identity_setting(
        100, "optimization", "steps of linear warm-up; 0 for none", minimum=0, maximum=MAX_STEPS, unit="STEPS"
    )
    optimizer: str = identity_setting(
        "adamw",
        "optimization",
        "adamw for all parameters, or muon for the matrices between embedding and head, and adamw for the others",
        choices=OPTIMIZERS,
    )
    weight_decay: float = identity_setting(
        0.1, "optimization", "decoupled weight decay, not on norms and biases; 0 for none", minimum=0.0
    )
    muon_momentum: float = identity_setting(
        0.95,
        "optimization",
        "decay of Muon's momentum; 0 for none",
        minimum=0.0,
        below=1.0,
        only_with=("optimizer", ("muon",)),
    )
    adam_beta1: float = identity_setting(0.9, "optimization", "decay of AdamW's first moment", minimum=0.0, below=1.0)
    adam_beta2: float = identity_setting(0.95, "optimization", "decay of AdamW's second moment", minimum=0.0, below=1.0)
    max_grad_norm: float = identity_setting(
        1.0, "optimization", "global gradient norm that gradients are clipped to; 0 for no clipping", minimum=0.0
    )
    z_loss: float = identity_setting(
        0.0,
        "optimization",
        "coefficient of the squared logarithm of the softmax's denominator, added to each token's loss (1e-4 in PaLM); "
        "0 for none",
        minimum=0.0,
        maximum=1.0,
    )
    max_skipped_steps: int = setting(
        10,
        "optimization",
        "steps in a row that may be skipped (loss or gradient norm not finite, or a spike) before the run stops",
        minimum=1,
        maximum=MAX_STEPS,
        unit="STEPS",
    )
    spike_sigma: float = setting(
        0.0,
        "optimization",
        "a loss this many standard deviations above the mean of the last ones is a spike; 0 for no spikes",
        minimum=0.0,
        unit="S",
    )
    spike_window: int = setting(
        100,
        "optimization",
        "losses that a spike is measured against: the last ones that were not skipped; at least half of them",
        minimum=10,
        maximum=10_000,
        unit="STEPS",
    )
    spike_action: str = setting(
        "warn",
        "optimization",
        "what a spike causes: a line, or that the step is skipped; then these three are fixed for a run",
        choices=("warn", "skip"),
    )
    seed: int = identity_setting(
        1337, "optimization", "seed of the initial weights and of the order of the data", minimum=0, maximum=2**63 - 1
    )

    # Execution
    precision: str = identity_setting(
        "auto",
        "execution",
        "of matrix products; auto is bf16 on accelerators that have it, else fp32",
        choices=PRECISIONS,
    )
    tensor_parallel_size: int | None = setting(
        None,
        "execution",
        "ranks one model is cut over, the others are data-parallel (default all)",
        minimum=1,
        unit="RANKS",
    )
    data_parallel_shard: str = setting(
        "none",
        "execution",
        "what data-parallel ranks share out instead of holding it each: zero2 gradients, moments and, between steps, "
        "parameters; zero3 parameters within a step too",
        choices=DATA_PARALLEL_SHARDS,
    )
    data_parallel_replicate_size: int = setting(
        1,
        "execution",
        "groups of data-parallel ranks, each of which shares out the model by itself; it divides them",
        minimum=1,
        unit="GROUPS",
        only_with=("data_parallel_shard", ("zero2", "zero3")),
    )
    tensor_slices: int | None = identity_setting(
        None,
        "execution",
        "slices V summed in a fixed order: a step has the same bits at any tp that divides V (default one a rank, any "
        "order; with --deterministic 8, or the largest power of two below that the sizes allow)",
        minimum=1,
    )
    deterministic: bool = identity_setting(
        False,
        "execution",
        "the same bits at any tp that divides the slices and any dp that halves the batch; one CPU thread a rank",
    )
    replicate_embeddings: bool = setting(False, "execution", "keep embedding and head whole on every rank")
    activation_checkpointing: str | None = setting(
        None,
        "execution",
        "activations that the backward pass computes again instead of keeping them: none, selective (feed-forward) or "
        "full (all but each block's input; the default)",
        choices=CHECKPOINTING,
    )
    disable_gradient_checkpointing: bool = setting(False, "execution", "the same as --activation-checkpointing none")
    sequence_parallel: bool = setting(
        False,
        "execution",
        "cut norms and residuals over the tokens of a tensor-parallel group: less memory, the same bytes sent",
    )
    overlap_collectives: bool = setting(
        False, "execution", "compute half of a micro-batch while the other half waits for a tensor-parallel collective"
    )
    float8: bool = identity_setting(
        False,
        "execution",
        "projections multiply in float8, with a scale for each row (torchao; from Hopper on, emulated on the CPU)",
    )
    compile: bool = setting(False, "execution", "compile the segments on the CPU too (default on accelerators)")
    disable_compile: bool = setting(False, "execution", "run eagerly on accelerators too")
    cuda_graphs: bool = setting(False, "execution", "replay compiled segments as CUDA graphs")
    plain_step: bool = setting(
        False,
        "execution",
        "switch off what only makes a step faster: compilation, weights cast once a step, gradients summed during the "
        "backward pass or computed while others are summed, on the CPU ranks that exchange tensors through shared "
        "memory",
    )

    # Checkpoints and logs
    checkpoint_dir: str = setting("pretrained", "checkpoints and logs", "folder of the run")
    checkpoint_interval: int = step_setting(
        350, "checkpoints and logs", "steps between checkpoints; 0 for only one at the end", minimum=0
    )
    keep_checkpoints: int = setting(
        50, "checkpoints and logs", "newest checkpoints kept; 0 for all", minimum=0, unit="COUNT"
    )
    keep_every: int = step_setting(
        0,
        "checkpoints and logs",
        "the first checkpoint at or after each multiple of so many steps stays for good, and is not among the newest "
        "kept; 0 for none",
        minimum=0,
    )
    checkpoint_mode: str = setting(
        "async",
        "checkpoints and logs",
        "async writes a copy while training goes on, sync waits until it is written",
        choices=CHECKPOINT_MODES,
    )
    checkpoint_hash: bool = setting(
        True, "checkpoints and logs", "record the SHA-256 of checkpoint files, and compare it before going on from them"
    )
    log_interval: int = step_setting(10, "checkpoints and logs", "steps between log lines", minimum=1)
    fingerprint_interval: int | None = step_setting(
        None,
        "checkpoints and logs",
        "steps between fingerprints of parameters and moments; 0 for none; with --deterministic (default 100, else "
        "none) also one at each checkpoint",
        minimum=0,
    )
    drift_check_interval: int = step_setting(
        0,
        "checkpoints and logs",
        "steps between comparisons of parameters that several ranks hold; 0 for only those before each checkpoint",
        minimum=0,
    )

    # Samples
    sample_interval: int = step_setting(
        0,
        "samples",
        "step of the first samples of the model's text; the next come after twice as many, and so on, and at the end; "
        "0 for none",
        minimum=0,
    )
    sample_prompts: str | None = setting(
        None, "samples", "prompts that are continued: one a line, or in a .jsonl file one object a line", unit="FILE"
    )
    sample_tokens: int = setting(
        64, "samples", "most tokens that are added to a prompt", minimum=1, maximum=2**20, unit="TOKENS"
    )
    sample_temperature: float = setting(
        0.8, "samples", "temperature they are drawn at; 0 for the likeliest token each time", minimum=0.0
    )

    # Tracking
    progress_bar: bool = setting(True, "tracking", "show a progress bar beside the lines")
    jsonl: bool = setting(
        True, "tracking", "write metrics.jsonl, which loss.png, report.html and an audit are made from"
    )
    csv: bool = setting(False, "tracking", "write metrics.csv, a row a logged step, for a spreadsheet")
    tensorboard: bool = setting(False, "tracking", "write TensorBoard events into tensorboard/")
    wandb_project: str | None = setting(
        None, "tracking", "log to this project of Weights & Biases; its WANDB_MODE is respected", unit="NAME"
    )
    wandb_entity: str | None = setting(
        None, "tracking", "user or team the project belongs to (default that of the login)", unit="NAME"
    )
    wandb_run_name: str | None = setting(
        None, "tracking", "name shown there (default that of the run's folder)", unit="NAME"
    )
    wandb_checkpoints: bool = setting(False, "tracking", "upload each checkpoint there, in the background")
    drop_uploaded_checkpoints: bool = setting(
        False, "tracking", "remove local checkpoints whose upload is confirmed, but for the newest"
    )

    # Stopping and hangs
    wall_time: str | None = setting(
        None,
        "stopping and hangs",
        "time since the launch, as [DAYS-]HH:MM:SS, by which the run has saved and stopped (default no limit)",
        unit="TIME",
    )
    startup_timeout: float = setting(
        1800.0,
        "stopping and hangs",
        "seconds that ranks wait for each other until the first step is done, and in validations and saves; 0 for ever",
        minimum=0.0,
        unit="SECONDS",
    )
    step_timeout: float = setting(
        600.0,
        "stopping and hangs",
        "seconds that a later step, or waiting for its data, may take before the run is taken for hung; 0 for ever",
        minimum=0.0,
        unit="SECONDS",
    )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def identity(self) -> dict[str, Any]:
        """The settings that every start of one run must share; the spike settings only if spikes skip steps."""
        silent = self.without_meaning()
        names = [f.name for f in fields(self) if f.metadata.get("identity") and f.name not in silent]
        if self.spike_sigma > 0 and self.spike_action == "skip":
            names += ["spike_sigma", "spike_window", "spike_action"]
        return {name: getattr(self, name) for name in names}

    def without_meaning(self) -> dict[str, tuple[str, tuple[str, ...]]]:
        """The fields with no effect given another field's value, each with that field and the values it needs."""
        needs = {f.name: f.metadata["only_with"] for f in fields(self) if "only_with" in f.metadata}
        return {name: need for name, need in needs.items() if getattr(self, need[0]) not in need[1]}

    @property
    def checkpointing(self) -> str:
        """The kind of activation recomputation in the backward pass: none, selective or full."""
        return self.activation_checkpointing or ("none" if self.disable_gradient_checkpointing else "full")

    def compiles_on(self, device: str) -> bool:
        """Whether segments are compiled on a device of this type."""
        off = self.disable_compile or self.plain_step
        return self.compile or (device != "cpu" and not off)

    def replace(self, **changes: Any) -> RunSettings:
        return dataclasses.replace(self, **changes)
