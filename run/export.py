"""Exporting a checkpoint to a Hugging Face folder or one `.pth` file, verified before it gets its final name.

1. Load the model, on any number of ranks, and compute its logits on real text.
2. Write weights, `config.json`, `generation_config.json`, tokenizer and model card to a temporary folder beside the
   output.
3. Free the model, let `transformers` load the folder and compare its logits. If they differ, delete the folder;
   otherwise rename it. A .pth file is instead read back and must be bit-identical.
"""

from __future__ import annotations

import gc
import pickle
import secrets
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from colonnade.checkpoint.hugging_face_export import (
    hugging_face_config,
    write_single_file,
    write_weights,
)
from colonnade.checkpoint.single_file import WEIGHTS_KEY
from colonnade.errors import RunError, UsageError
from colonnade.files import write_text
from colonnade.runtime.vote import on_first_rank, one_line, vote
from run.data import first_texts
from run.model_card import model_card

if TYPE_CHECKING:
    from colonnade.parallel.mesh import ParallelLayout
    from run.trained_model import TrainedModel

TOLERANCE = 1e-4
"""Largest difference of float32 logits, relative to the norm of the expected ones: allows only for the rounding of
other kernels."""

# Tokens compared: at most this many rows of real text, each at most this long.
_ROWS, _LENGTH = 4, 256

# ------------------------------------------------------------------------------------------------ a Hugging Face folder


def export_checkpoint(
    trained: TrainedModel,
    layout: ParallelLayout,
    output: Path,
    *,
    dtype: str = "float32",
    max_shard_size: str = "5GB",
    text: str | None = None,
) -> str:
    """Write a checkpoint as the Hugging Face folder `output`, which does not exist yet. Collective.

    Args:
        dtype: dtype of the written weights: float32, bfloat16 or float16.
        max_shard_size: maximum size of a weights file, such as `5GB`.
        text: text to compare logits on; None for the run's own data, if it is still there.

    Returns:
        One line that says what was written and how closely the logits agree.

    Raises:
        UsageError: the model cannot be exported.
        RunError: something cannot be written, or `transformers` computes other logits; nothing is left behind.
    """
    with vote():
        ids = trained.special_token_ids()
        config = hugging_face_config(trained.config, dtype=dtype, **ids)
    tokens, source = on_first_rank(lambda: comparison_tokens(trained, text))
    stored = getattr(torch, dtype)
    model = trained.load(layout)
    with torch.no_grad():
        for parameter in model.parameters():  # so that the expected logits come from the weights as written
            parameter.copy_(parameter.to(stored).to(parameter.dtype))
    expected = model.logits(tokens.to(layout.device)).float().cpu()
    aside = output.with_name(f".{output.name}-{secrets.token_hex(4)}")
    try:
        on_first_rank(lambda: _begin(aside))
        write_weights(aside, model.whole_shapes(), model.whole_parameter, stored, max_shard_size)
        parameters = model.num_parameters()
        del model, parameter
        gc.collect()
        card = model_card(trained, parameters, dtype, output.name)
        on_first_rank(lambda: _write_rest(aside, trained, config, ids, card))
        difference = on_first_rank(lambda: compare(aside, trained, tokens, expected))
        on_first_rank(lambda: _finish(aside, output))
    except BaseException:
        if layout.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    return (
        f"{output}: {parameters:,} parameters in {dtype}; transformers' logits on {tokens.numel()} tokens of {source} "
        f"are within {difference:.1e} of the checkpoint's"
    )


def comparison_tokens(trained: TrainedModel, text: str | None) -> tuple[torch.Tensor, str]:
    """Token ids [rows, length] of real text to compare logits on, and a description of their source."""
    source = "the text given"
    texts = [text] if text is not None else first_texts(trained.settings)
    if text is None:
        source = "the run's data"
        if not texts:
            texts, source = [__doc__ or ""], "the exporter's own description, since the run's data are not there"
    ids: list[int] = []
    for piece in texts:
        ids += trained.tokenizer.encode(piece, add_special_tokens=False)
        if len(ids) >= _ROWS * _LENGTH:
            break
    if not ids:
        raise UsageError("the text to compare on has no tokens; give --text-file with some")
    length = min(_LENGTH, trained.config.max_position_embeddings, len(ids))
    rows = min(_ROWS, len(ids) // length)
    return torch.tensor(ids[: rows * length]).view(rows, length), source


def _begin(folder: Path) -> None:
    try:
        folder.mkdir()
    except OSError as error:
        raise RunError(f"{folder} cannot be made: {error.strerror or error}") from error


def _write_rest(folder: Path, trained: TrainedModel, config: Any, ids: dict[str, Any], card: str) -> None:
    from transformers import GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
        config.save_pretrained(folder)
        GenerationConfig(**ids).save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}") from error
    write_text(folder / "README.md", card)


def compare(folder: Path, trained: TrainedModel, tokens: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative difference between `transformers`' logits for the folder and the expected ones.

    Raises:
        RunError: the difference is above `TOLERANCE`, or the written tokenizer encodes differently.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    trust = trained.settings.trust_remote_code
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(tokens).logits.float()
    difference = float((logits - expected).norm() / expected.norm())
    if not difference <= TOLERANCE:
        raise RunError(
            f"transformers computes other logits from what was written: they differ by {difference:.1e}, and "
            f"{TOLERANCE:.0e} is allowed; nothing was exported"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    text = trained.tokenizer.decode(tokens[0])
    if tokenizer.encode(text, add_special_tokens=False) != trained.tokenizer.encode(text, add_special_tokens=False):
        raise RunError("the tokenizer that was written encodes otherwise than the run's; nothing was exported")
    return difference


def _finish(aside: Path, output: Path) -> None:
    try:
        aside.rename(output)
    except OSError as error:
        raise RunError(f"--output {output} cannot be written: {error.strerror or error}") from error


# -------------------------------------------------------------------------------------------------------- a .pth file


def export_single_file(trained: TrainedModel, layout: ParallelLayout, output: Path, dtype: str) -> str:
    """Write a checkpoint's weights as the `model_state_dict` of one `.pth` file. Collective.

    Raises:
        RunError: the file cannot be written, or does not read back identically; nothing is left behind.
    """
    model = trained.load(layout)
    aside = output.with_name(f".{output.name}-{secrets.token_hex(4)}")
    plain: dict[str, Any] = {"model_config": trained.config.to_dict()}
    if trained.step is not None:
        plain["global_step"] = trained.step
    stored = getattr(torch, dtype)
    try:
        write_single_file(aside, model.whole_shapes(), model.whole_parameter, stored, plain)
        with vote():
            written = _read_back(aside) if layout.is_main else {}
        for name in model.whole_shapes():
            value = model.whole_parameter(name).cpu().to(stored)
            is_same = not layout.is_main or (name in written and torch.equal(written[name], value))
            on_first_rank(partial(_require_same, name, is_same))
        on_first_rank(lambda: _finish(aside, output))
    except BaseException:
        if layout.is_main:
            aside.unlink(missing_ok=True)
        raise
    return f"{output}: {model.num_parameters():,} parameters in {dtype}, read back to the bit"


def _read_back(path: Path) -> dict[str, torch.Tensor]:
    try:
        weights: dict[str, torch.Tensor] = torch.load(path, weights_only=True, mmap=True)[WEIGHTS_KEY]
    except (RuntimeError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise RunError(f"{path} cannot be read back ({one_line(error)}); nothing was exported") from error
    return weights


def _require_same(name: str, is_same: bool) -> None:
    if not is_same:
        raise RunError(f"{name!r} reads back otherwise than it was written; nothing was exported")
