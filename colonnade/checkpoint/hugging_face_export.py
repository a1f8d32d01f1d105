"""Writing a model as Hugging Face and plain PyTorch have it, one parameter after the other.

`write_weights` holds one file's tensors beside the model. Both ways put every parameter together on all ranks in turn
(collective), and the first rank writes.
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
from colonnade.parallel.vote import on_first_rank, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WholeParameter = Callable[[str], Tensor]


def hugging_face_config(config: ModelConfig, **extra: Any) -> PreTrainedConfig:
    """The configuration that makes `transformers` build this model.

    Args:
        extra: further keys of a `config.json`, such as the ids of special tokens.

    Raises:
        UsageError: there is none: read back, it would be another model.
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
        shapes: of the whole parameters, by name.
        whole: the value of one; collective.
        dtype: that they are converted to.
        max_shard_size: of a file, such as `5GB`; so much is held beside the model, where that is cut or converted.

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
        file.chmod(0o666 & ~_umask())  # safetensors leaves it to the owner alone
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file} cannot be written: {one_line(error)[:200]}") from error


def _umask() -> int:
    """What the process takes from the permissions of new files: it can only be read by setting it."""
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
    """Write parameters into one `.pth` file as its `model_state_dict`, beside `plain` values. Collective.

    The first rank holds the whole model meanwhile, beside its own part where there are several ranks.

    Raises:
        RunError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for name in shapes:
        value = whole(name)
        if dist.get_rank() == 0:
            value = value.to(device="cpu", dtype=dtype)
            # torch.save writes a view's whole storage, the padding of a table too.
            is_view = value.untyped_storage().nbytes() != value.numel() * value.element_size()
            tensors[name] = value.clone() if is_view else value
        del value

    def save() -> None:
        try:
            torch.save({WEIGHTS_KEY: tensors, **plain}, file)
        # torch's writer raises a RuntimeError on a full disk.
        except (OSError, RuntimeError) as error:
            raise RunError(f"{file} cannot be written: {one_line(error)[:200]}") from error

    on_first_rank(save)
