"""What to say of a flag or key that there is not: what other trainers call so is called here, or the nearest name.

Nothing heavy is imported, so that `--help` answers at once.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection

# What an unknown name means here, and the names: those of Megatron-LM, torchtitan, litgpt, nanochat and transformers'
# Trainer (docs/coming_from.md), without dots and sections.
_MEANINGS = {
    "--learning-rate": "lr max-lr peak-lr",
    "--min-learning-rate": "min-lr lr-min final-lr",
    "--warmup-steps": "warmup lr-warmup-iters lr-warmup-steps warmup-iters num-warmup-steps lr-warmup-fraction "
    "warmup-ratio",
    "--schedule": "lr-schedule lr-scheduler lr-scheduler-type lr-decay-style scheduler decay-type",
    "--schedule-steps": "lr-decay-iters lr-decay-steps",
    "--decay-steps": "lr-wsd-decay-iters warmdown-ratio decay-ratio",
    "--total-steps": "steps max-steps num-steps train-steps training-steps train-iters max-iters num-iterations",
    "--total-steps, each of --tokens-per-step": "tokens num-tokens max-tokens train-tokens train-samples epochs "
    "num-epochs num-train-epochs",
    "--block-size": "seq-len seq-length sequence-length max-seq-len max-seq-length max-length context-length "
    "context-size context-window ctx-len n-ctx",
    "--initial-batch-size (sequences a rank computes at once) or --tokens-per-step (over all ranks)": "batch-size bs "
    "train-batch-size",
    "--initial-batch-size": "micro-batch-size device-batch-size local-batch-size per-device-train-batch-size mbs",
    "--tokens-per-step (in tokens, not sequences)": "global-batch-size total-batch-size gbs",
    "--gradient-accumulation-steps": "grad-accum grad-accum-steps gradient-accumulation accumulation-steps "
    "accumulate-grad-batches",
    "--max-grad-norm": "clip-grad grad-clip clip-grad-norm gradient-clipping max-norm",
    "--weight-decay": "wd",
    "--adam-beta1": "beta1 adam-b1",
    "--adam-beta2": "beta2 adam-b2",
    "--seed": "random-seed manual-seed",
    "--precision": "dtype torch-dtype bf16 fp16 fp32 amp mixed-precision mixed-precision-param param-dtype",
    "--float8": "fp8 fp8-format use-fp8",
    "--tensor-parallel-size": "tp tp-size tp-degree tensor-parallel tensor-parallel-degree tensor-model-parallel-size "
    "model-parallel-size",
    "all ranks that --tensor-parallel-size leaves over are data-parallel": "dp dp-size data-parallel "
    "data-parallel-size data-parallel-degree",
    "torchrun starts the ranks, --tensor-parallel-size of them for each model": "devices num-gpus gpus ngpus num-nodes "
    "nnodes nproc-per-node world-size",
    "--data-parallel-shard": "zero zero-stage fsdp use-fsdp use-distributed-optimizer use-torch-fsdp2 "
    "use-megatron-fsdp data-parallel-shard-degree data-parallel-sharding-strategy sharding-strategy deepspeed",
    "--data-parallel-replicate-size": "data-parallel-replicate-degree",
    "there is no pipeline, context or expert parallelism: see --tensor-parallel-size": "pp pipeline-parallel-size "
    "pipeline-model-parallel-size pipeline-parallel-degree cp context-parallel-size context-parallel-degree ep "
    "expert-model-parallel-size expert-parallel-degree",
    "--activation-checkpointing": "gradient-checkpointing recompute recompute-activations recompute-granularity "
    "activation-checkpoint activation-checkpoint-mode ac-mode",
    "--compile": "torch-compile use-compile",
    "--deterministic": "deterministic-mode full-determinism",
    "the model's sizes are in the file of --model-config, or of a --preset": "num-layers n-layer n-layers depth "
    "hidden-size n-embd d-model dim model-dim ffn-hidden-size intermediate-size num-attention-heads n-head n-heads "
    "num-heads num-key-value-heads num-query-groups n-kv-head head-dim kv-channels max-position-embeddings vocab-size "
    "rope-theta rotary-base",
    "there is no dropout, as in the models of --model-config": "dropout attention-dropout hidden-dropout",
    "--preset, --model-config, or --init-from for trained weights": "model model-name model-size flavor model-type",
    "--init-from": "pretrained from-pretrained model-name-or-path initial-checkpoint-dir initial-load-path",
    "--data-glob": "data data-path data-dir data-files dataset dataset-path dataset-name train-data train-data-path "
    "train-file",
    "--validation-glob": "val-data val-data-path valid-data valid-data-path validation-data validation-file eval-data "
    "eval-dataset",
    "--text-column": "text-key text-field json-keys dataset-text-field",
    "--tokenizer-path": "tokenizer tokenizer-model tokenizer-name tokenizer-dir tokenizer-name-or-path",
    "the environment variable RESUME_TOKENIZER_WORKERS": "num-workers dataloader-num-workers",
    "--validation-interval": "eval-interval eval-every eval-steps eval-freq val-interval val-check-interval",
    "--validation-chunks": "eval-iters eval-tokens eval-batches max-eval-samples",
    "--checkpoint-dir": "out-dir output-dir save save-dir run-dir ckpt-dir checkpoint-folder",
    "--checkpoint-interval": "save-interval save-every save-steps save-freq ckpt-interval checkpoint-every",
    "--keep-checkpoints": "save-total-limit keep-latest-k",
    "the same command goes on with the run in its --checkpoint-dir": "resume resume-from resume-from-checkpoint "
    "resume-from-step load load-dir load-checkpoint checkpoint-path",
    "--log-interval": "log-every log-freq log-steps logging-steps log-every-n-steps",
    "--sample-interval": "sample-every",
    "--wandb-project": "wandb use-wandb enable-wandb",
    "--wandb-run-name": "run-name wandb-name wandb-exp-name",
    "--tensorboard": "tensorboard-dir use-tensorboard enable-tensorboard",
    "--csv, --tensorboard or --wandb-project": "report-to logger logger-name",
    "--wall-time": "time-limit max-time exit-duration-in-mins",
}
_OTHER_NAMES = {name: meaning for meaning, names in _MEANINGS.items() for name in names.split()}
# Below this, names have little more in common than single letters.
_CUTOFF = 0.6
_FLAG = re.compile(r"--[a-z0-9-]+")


def closest(name: str, known: Collection[str]) -> str | None:
    """The known name that is spelled most like `name`; None if none is."""
    spelled = {_plain(one): one for one in known}
    found = difflib.get_close_matches(_plain(name), spelled, n=1, cutoff=_CUTOFF)
    return spelled[found[0]] if found else None


def advice(name: str, known: Collection[str], otherwise: str) -> str:
    """What to say of the unknown `name`: its name here, else the nearest known one, else `otherwise`.

    Args:
        known: the flags of the command, or the keys of the file. Only these are named, spelled as here.
    """
    spelled = {_plain(one): one for one in known}
    meaning = _OTHER_NAMES.get(_plain(name))
    if meaning is not None and all(_plain(flag) in spelled for flag in _FLAG.findall(meaning)):
        told = _FLAG.sub(lambda flag: spelled[_plain(flag[0])], meaning)
        return f"here it is {told}" if meaning.startswith("--") else told
    near = closest(name, known)
    return otherwise if near is None else f"the nearest known one is {near}"


def _plain(name: str) -> str:
    """A flag or key without what differs between programs; of a dotted one the last part."""
    return name.removeprefix("--").rpartition(".")[2].replace("_", "-").lower()
