"""The table of run settings: a default, limits, group and help text per field. Flags and YAML keys derive from it.

Nothing heavy is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, fields
from typing import Any

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
PRECISION_ALIASES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
TOKENIZER_BACKENDS = ("auto", "hf", "fastokens")
CHECKPOINT_MODES = ("async", "sync")
SCHEDULES = ("cosine", "wsd", "constant")
CHECKPOINTING = ("none", "selective", "full")
DECAY_SHAPES = ("1-sqrt", "linear", "cosine")
OPTIMIZERS = ("adamw", "muon")
DATA_PARALLEL_SHARDS = ("none", "zero2", "zero3")
MAX_STEPS = 10**9
# Logits are divided by it: with much less, their quotients are beyond the largest float.
MIN_TEMPERATURE = 1e-4
# Four times the largest published batches. Reading ahead holds several copies of a step's tokens in memory.
MAX_TOKENS_PER_STEP = 2**28


def setting(default: Any, group: str, text: str, **extra: Any) -> Any:
    """A field with its help text.

    `identity` marks a setting whose change makes it a different run; `unit` is the flag's metavar; `only_with` names
    another field and the values it must have for this one to take effect; `aliases` are other words for its choices.
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
        None,
        "model",
        "model size: the name of a file in presets/, or a path to one (default argonne-2b; tiny on the CPU)",
        unit="NAME",
    )
    model_config: str | None = setting(
        None, "model", "Hugging Face config.json, or its folder, to use instead of a preset", unit="PATH"
    )
    init_from: str | None = identity_setting(
        None,
        "model",
        "Hugging Face folder whose weights a new run starts from, instead of random ones; also supplies "
        "architecture and tokenizer unless those are given",
        unit="PATH",
    )

    # Data
    data_glob: str | None = setting(
        None,
        "data",
        "shards to train on: comma-separated paths, patterns or URLs, or name=glob:weight,... for a mixture "
        "(default: the shards in data/)",
    )
    text_column: str = identity_setting("text", "data", "column (key, for JSON lines) that holds the text", unit="NAME")
    symbol_filter: bool = identity_setting(
        True,
        "data",
        "drop rows that have more digits and symbols than letters; off for mathematics, tables or logs",
    )
    tokenizer_path: str | None = setting(None, "data", "tokenizer: a folder or a Hugging Face hub name")
    tokenizer_backend: str = setting(
        "auto",
        "data",
        "library that tokenizes: hf (tokenizers) or fastokens, which is faster; auto uses fastokens if it is "
        "installed and was verified to produce the same ids",
        choices=TOKENIZER_BACKENDS,
    )
    trust_remote_code: bool = setting(False, "data", "run Python code shipped with the tokenizer")
    add_document_boundary_tokens: bool = identity_setting(
        False, "data", "surround each document with BOS and EOS tokens"
    )
    shuffle: bool = identity_setting(
        True,
        "data",
        "read the row groups, and the rows within each, in an order derived from --seed that differs in every epoch",
    )
    data_lanes: int | None = setting(
        None,
        "data",
        "number of lanes V the data is read in, fixed when the run begins; if dp divides V, each data-parallel rank "
        "reads only its own lanes (default from the number and size of row groups, up to 48)",
        minimum=1,
        maximum=4096,
        unit="LANES",
    )
    packing: str = identity_setting(
        "concat",
        "data",
        "how documents fill blocks: concat joins them end to end and cuts at block boundaries; best-fit packs whole "
        "documents where they fit best",
        choices=("concat", "best-fit"),
    )
    document_mask: bool = identity_setting(
        False,
        "data",
        "restrict attention to each document, restart positions at each, and predict no token across a document "
        "boundary",
    )
    strict_data: bool = setting(
        False, "data", "stop at a damaged file or row group, instead of recording and skipping it"
    )
    validation_glob: str | None = setting(None, "data", "shards to validate on (default no validation)")
    validation_interval: int = step_setting(
        250, "data", "steps between validations; 0 for only one at the end", minimum=0
    )
    validation_chunks: int = setting(
        64,
        "data",
        "validation blocks to evaluate, the first ones of the shards; 0 for all of them",
        minimum=0,
        unit="BLOCKS",
    )

    # Batch
    block_size: int | None = identity_setting(
        None, "batch", "tokens per sequence (default the model's context length)", minimum=1, unit="TOKENS"
    )
    initial_batch_size: str = setting(
        "auto",
        "batch",
        "sequences per micro-batch on each rank: a number, lowered if it does not fit into memory, or auto for the "
        "largest that fits",
    )
    gradient_accumulation_steps: int = setting(
        1,
        "batch",
        "micro-batches per optimizer step, on each rank",
        minimum=1,
        maximum=MAX_TOKENS_PER_STEP,
        unit="COUNT",
    )
    tokens_per_step: int | None = setting(
        None,
        "batch",
        "tokens per optimizer step over all ranks, which then determines the accumulation (default: the "
        "accumulation determines it)",
        minimum=1,
        maximum=MAX_TOKENS_PER_STEP,
        unit="TOKENS",
    )
    memory_limit_gib: float | None = setting(
        None,
        "batch",
        "memory in GiB that each rank may use while the micro-batch is tuned (default free memory / ranks; on a "
        "GPU, 0.95 of its memory)",
        above=0.0,
        maximum=2.0**20,
    )

    # Optimization
    total_steps: int = identity_setting(
        1000, "optimization", "total number of optimizer steps of the run", minimum=1, maximum=MAX_STEPS, unit="STEPS"
    )
    learning_rate: float = identity_setting(3e-4, "optimization", "peak learning rate", above=0.0, maximum=10.0)
    min_learning_rate: float | None = identity_setting(
        None,
        "optimization",
        "learning rate at the end of the schedule (default a tenth of --learning-rate)",
        minimum=0.0,
        only_with=("schedule", ("cosine", "wsd")),
    )
    schedule: str = identity_setting(
        "cosine",
        "optimization",
        "learning rate after the warm-up: cosine decay until the horizon (--schedule-steps), wsd (stable, then a "
        "decay that ends at the horizon), or constant",
        choices=SCHEDULES,
    )
    schedule_steps: int | None = identity_setting(
        None,
        "optimization",
        "horizon of the schedule: step at which the minimum learning rate is reached (default --total-steps)",
        minimum=1,
        maximum=MAX_STEPS,
        unit="STEPS",
        only_with=("schedule", ("cosine", "wsd")),
    )
    decay_steps: int | None = identity_setting(
        None,
        "optimization",
        "length in steps of the wsd decay, which ends at the horizon (default a tenth of the horizon)",
        minimum=1,
        maximum=MAX_STEPS,
        unit="STEPS",
        only_with=("schedule", ("wsd",)),
    )
    decay_shape: str = identity_setting(
        "1-sqrt",
        "optimization",
        "shape of the wsd decay",
        choices=DECAY_SHAPES,
        only_with=("schedule", ("wsd",)),
    )
    warmup_steps: int = identity_setting(
        100, "optimization", "steps of linear warm-up; 0 for none", minimum=0, maximum=MAX_STEPS, unit="STEPS"
    )
    optimizer: str = identity_setting(
        "adamw",
        "optimization",
        "adamw for all parameters, or muon for the matrices between embedding and head and AdamW for the rest",
        choices=OPTIMIZERS,
    )
    weight_decay: float = identity_setting(
        0.1, "optimization", "decoupled weight decay, not applied to norms and biases; 0 for none", minimum=0.0
    )
    muon_momentum: float = identity_setting(
        0.95,
        "optimization",
        "decay rate of Muon's momentum; 0 for none",
        minimum=0.0,
        below=1.0,
        only_with=("optimizer", ("muon",)),
    )
    adam_beta1: float = identity_setting(
        0.9, "optimization", "decay rate of AdamW's first moment", minimum=0.0, below=1.0
    )
    adam_beta2: float = identity_setting(
        0.95, "optimization", "decay rate of AdamW's second moment", minimum=0.0, below=1.0
    )
    max_grad_norm: float = identity_setting(
        1.0, "optimization", "global norm to clip gradients to; 0 for no clipping", minimum=0.0
    )
    z_loss: float = identity_setting(
        0.0,
        "optimization",
        "coefficient of the z-loss, the squared log of the softmax denominator, added to each token's loss (1e-4 in "
        "PaLM); 0 for none",
        minimum=0.0,
        maximum=1.0,
    )
    max_skipped_steps: int = setting(
        10,
        "optimization",
        "stop the run after this many consecutive skipped steps (loss or gradient norm not finite, or a spike)",
        minimum=1,
        maximum=MAX_STEPS,
        unit="STEPS",
    )
    spike_sigma: float = setting(
        0.0,
        "optimization",
        "a loss more than this many standard deviations above the mean of recent losses is a spike; 0 for no spike "
        "detection",
        minimum=0.0,
        unit="S",
    )
    spike_window: int = setting(
        100,
        "optimization",
        "number of recent losses, from steps that were not skipped, to compare with; detection starts once half of "
        "them are there",
        minimum=10,
        maximum=10_000,
        unit="STEPS",
    )
    spike_action: str = setting(
        "warn",
        "optimization",
        "what a spike causes: warn logs a line, skip skips the step; with skip, the three spike settings are fixed "
        "for a run",
        choices=("warn", "skip"),
    )
    seed: int = identity_setting(
        1337, "optimization", "seed of the initial weights and of the data order", minimum=0, maximum=2**63 - 1
    )

    # Execution
    precision: str = identity_setting(
        "auto",
        "execution",
        "precision of matrix products; auto is bf16 on accelerators that support it, otherwise fp32",
        choices=PRECISIONS,
        aliases=PRECISION_ALIASES,
    )
    tensor_parallel_size: int | None = setting(
        None,
        "execution",
        "ranks that each copy of the model is sharded over; the remaining factor of the world size is data "
        "parallelism (default all ranks)",
        minimum=1,
        unit="RANKS",
    )
    data_parallel_shard: str = setting(
        "none",
        "execution",
        "what is sharded over data-parallel ranks: none; zero2 gradients, moments and, between steps, parameters; "
        "zero3 parameters within a step as well",
        choices=DATA_PARALLEL_SHARDS,
    )
    data_parallel_replicate_size: int = setting(
        1,
        "execution",
        "number of groups that the data-parallel ranks are divided into, each of which shards the whole model; must "
        "divide dp",
        minimum=1,
        unit="GROUPS",
        only_with=("data_parallel_shard", ("zero2", "zero3")),
    )
    tensor_slices: int | None = identity_setting(
        None,
        "execution",
        "number V of slices to compute in and sum in a fixed order: a step is bit-identical at any tp that divides "
        "V (default one per rank, no fixed order; with --deterministic 8, or the largest smaller power of two that "
        "the model's sizes allow)",
        minimum=1,
    )
    deterministic: bool = identity_setting(
        False,
        "execution",
        "bit-identical results at any tp that divides the number of slices and any dp that halves the batch evenly; "
        "one CPU thread per rank",
    )
    replicate_embeddings: bool = setting(False, "execution", "keep a full copy of embedding and head on every rank")
    activation_checkpointing: str | None = setting(
        None,
        "execution",
        "activations that the backward pass recomputes instead of storing: none, selective (the feed-forward's) or "
        "full (all but each block's input; the default)",
        choices=CHECKPOINTING,
    )
    disable_gradient_checkpointing: bool = setting(False, "execution", "same as --activation-checkpointing none")
    sequence_parallel: bool = setting(
        False,
        "execution",
        "shard norms and residuals over the tokens within each tensor-parallel group: less memory, the same "
        "communication volume",
    )
    overlap_collectives: bool = setting(
        False,
        "execution",
        "compute one half of each micro-batch while a tensor-parallel collective of the other half is in flight",
    )
    float8: bool = identity_setting(
        False,
        "execution",
        "compute projections in float8 with rowwise scaling (torchao; needs Hopper or later, emulated on the CPU)",
    )
    compile: bool = setting(False, "execution", "use torch.compile on the CPU too (default only on accelerators)")
    disable_compile: bool = setting(False, "execution", "do not use torch.compile on accelerators either")
    cuda_graphs: bool = setting(False, "execution", "replay the compiled segments as CUDA graphs")
    plain_step: bool = setting(
        False,
        "execution",
        "disable what only makes steps faster: compilation, casting weights once per step, summing gradients during "
        "the backward pass, computing weight gradients while other sums are in flight, and exchange through shared "
        "memory on the CPU",
    )

    # Checkpoints and logs
    checkpoint_dir: str = setting(
        "pretrained", "checkpoints and logs", "folder of the run: checkpoints, settings and logs"
    )
    checkpoint_interval: int = step_setting(
        350, "checkpoints and logs", "steps between checkpoints; 0 for only one at the end", minimum=0
    )
    keep_checkpoints: int = setting(
        50, "checkpoints and logs", "number of newest checkpoints to keep; 0 for all", minimum=0, unit="COUNT"
    )
    keep_every: int = step_setting(
        0,
        "checkpoints and logs",
        "keep the first checkpoint at or after each multiple of so many steps for good, besides the newest; 0 for none",
        minimum=0,
    )
    checkpoint_mode: str = setting(
        "async",
        "checkpoints and logs",
        "async writes a copy while training continues; sync waits until the checkpoint is written",
        choices=CHECKPOINT_MODES,
    )
    checkpoint_hash: bool = setting(
        True, "checkpoints and logs", "record the SHA-256 of checkpoint files, and verify it before resuming from them"
    )
    log_interval: int = step_setting(10, "checkpoints and logs", "steps between log lines", minimum=1)
    fingerprint_interval: int | None = step_setting(
        None,
        "checkpoints and logs",
        "steps between fingerprints of parameters and moments; 0 for none (default 100 with --deterministic, "
        "otherwise none); with --deterministic also one at each checkpoint",
        minimum=0,
    )
    drift_check_interval: int = step_setting(
        0,
        "checkpoints and logs",
        "steps between checks that parameters held by several ranks are equal; 0 for only those before each checkpoint",
        minimum=0,
    )

    # Samples
    sample_interval: int = step_setting(
        0,
        "samples",
        "step after which the model's text is first sampled; again after 2, 4, 8, ... times as many steps and at "
        "the end; 0 for none",
        minimum=0,
    )
    sample_prompts: str | None = setting(
        None,
        "samples",
        "prompts to continue: one per line, or in a .jsonl file one object per line with the key prompt",
        unit="FILE",
    )
    sample_tokens: int = setting(
        64, "samples", "maximum number of tokens to generate per prompt", minimum=1, maximum=2**20, unit="TOKENS"
    )
    sample_temperature: float = setting(
        0.8,
        "samples",
        "sampling temperature; 0 for greedy decoding",
        minimum=0.0,
        minimum_above_zero=MIN_TEMPERATURE,
    )

    # Tracking
    progress_bar: bool = setting(True, "tracking", "show a progress bar in addition to the log lines")
    jsonl: bool = setting(True, "tracking", "write metrics.jsonl, which loss.png, report.html and audits need")
    csv: bool = setting(False, "tracking", "write metrics.csv for spreadsheets, one row per logged step")
    tensorboard: bool = setting(False, "tracking", "write TensorBoard events into tensorboard/ in the run's folder")
    wandb_project: str | None = setting(
        None, "tracking", "log to this Weights & Biases project; WANDB_MODE is respected", unit="NAME"
    )
    wandb_entity: str | None = setting(
        None, "tracking", "Weights & Biases user or team that owns the project (default that of the login)", unit="NAME"
    )
    wandb_run_name: str | None = setting(
        None, "tracking", "name of the run on Weights & Biases (default the name of the run's folder)", unit="NAME"
    )
    wandb_checkpoints: bool = setting(False, "tracking", "upload each checkpoint to Weights & Biases in the background")
    drop_uploaded_checkpoints: bool = setting(
        False, "tracking", "delete local checkpoints once their upload is confirmed, except the newest"
    )

    profile_start: int = step_setting(
        0,
        "tracking",
        "first step to record with torch.profiler, into profile/ in the run's folder; 0 for none",
        minimum=0,
    )
    profile_steps: int = step_setting(3, "tracking", "number of steps to record from --profile-start on", minimum=1)

    # Stopping and hangs
    wall_time: str | None = setting(
        None,
        "stopping and hangs",
        "time limit since the launch, as [DAYS-]HH:MM:SS or 2h: the run saves and stops before it is over (default no "
        "limit)",
        unit="TIME",
    )
    startup_timeout: float = setting(
        1800.0,
        "stopping and hangs",
        "seconds that ranks wait for each other up to the end of the first step, and in validations, samples and "
        "saves; 0 for no limit",
        minimum=0.0,
        unit="SECONDS",
    )
    step_timeout: float = setting(
        600.0,
        "stopping and hangs",
        "seconds that a later step, or the wait for its data, may take before the run counts as hung; 0 for no limit",
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
