"""Writing a model in the formats of Hugging Face and plain PyTorch, one parameter after the other.

Both formats gather one full parameter at a time on all ranks (collective), and the first rank writes. `write_weights`
holds the tensors of only one file in addition to the model, `write_single_file` those of the whole model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from colonnade.checkpoint.hugging_face import INDEX_NAME
from colonnade.checkpoint.single_file import WEIGHTS_KEY
from colonnade.errors import RunError, UsageError
from colonnade.files import write_text
from colonnade.model_config import ModelConfig
from colonnade.runtime.vote import on_first_rank, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WholeParameter = Callable[[str], Tensor]


def hugging_face_config(config: ModelConfig, **extra: Any) -> PreTrainedConfig:
    """The configuration with which `transformers` builds this model.

    Args:
        extra: further keys of a `config.json`, such as the ids of special tokens.

    Raises:
        UsageError: there is none: read back, it would describe a different model.
    """
    from transformers import CONFIG_MAPPING

    values = config.to_dict()
    model_type, scaling = values.pop("model_type"), values.pop("rope_scaling")
    values["rope_parameters"] = {"rope_theta": values.pop("rope_theta"), **(scaling or {"rope_type": "default"})}
    attention_bias, mlp_bias = values.pop("attention_bias"), values.pop("mlp_bias")
    layers = values.pop("no_rope_layers")
    if model_type == "ernie4_5":
        values["use_bias"] = attention_bias
    elif model_type in ("llama", "qwen3", "smollm3"):
        values["attention_bias"] = attention_bias
    if model_type in ("llama", "smollm3"):
        values["mlp_bias"] = mlp_bias
    if model_type == "smollm3":
        values["no_rope_layers"] = layers or [1] * config.num_hidden_layers
    if model_type == "mistral":
        values["sliding_window"] = None
    theirs = CONFIG_MAPPING[model_type](**values, **extra)
    back = ModelConfig.from_dict(theirs.to_dict())
    if back != config:
        own, other = config.to_dict(), back.to_dict()
        name = next(name for name in own if own[name] != other[name])
        raise UsageError(f"transformers' {model_type} has no {name} {own[name]!r:.80}: this model cannot be exported")
    return theirs


def write_weights(
    folder: Path, shapes: Mapping[str, torch.Size], whole: WholeParameter, dtype: torch.dtype, max_shard_size: str
) -> None:
    """Write parameters as safetensors, in one file or in several with an index. Collective.

    Args:
        shapes: shapes of the full parameters, by name.
        whole: returns the full value of a parameter; collective.
        dtype: dtype the parameters are converted to.
        max_shard_size: size limit of a file, such as `5GB`; the first rank holds this much in addition to the model if
            that is sharded or converted.

    Raises:
        RunError: a file cannot be written.
    """
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()},
        max_shard_size=max_shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        tensors: dict[str, Tensor] = {}
        for name in names:
            value = whole(name)
            if dist.get_rank() == 0:
                tensors[name] = value.to(device="cpu", dtype=dtype).contiguous()
            del value
        on_first_rank(partial(_save, folder / file, tensors))
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        on_first_rank(lambda: write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n"))


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o666 & ~_umask())  # safetensors makes it readable by the owner only
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file} cannot be written: {one_line(error)[:200]}") from error


def _umask() -> int:
    """The process's umask. It can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_single_file(
    file: Path,
    shapes: Mapping[str, torch.Size],
    whole: WholeParameter,
    dtype: torch.dtype,
    plain: Mapping[str, Any],
) -> None:
    """Write parameters into one `.pth` file as its `model_state_dict`, together with the `plain` values. Collective.

    Meanwhile the first rank holds the whole model, in addition to its own shard if there are several ranks.

    Raises:
        RunError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name in shapes:
        value = whole(name)
        if dist.get_rank() == 0:
            value = value.to(device="cpu", dtype=dtype)
            # For a view, torch.save writes its whole storage, including the padding rows of embedding and head.
            is_view = value.untyped_storage().nbytes() != value.numel() * value.element_size()
            tensors[name] = value.clone() if is_view else value
        del value

    def save() -> None:
        try:
            torch.save({WEIGHTS_KEY: tensors, **plain}, file)
        # torch's writer raises RuntimeError if the disk is full.
        except (OSError, RuntimeError) as error:
            raise RunError(f"{file} cannot be written: {one_line(error)[:200]}") from error

    on_first_rank(save)
