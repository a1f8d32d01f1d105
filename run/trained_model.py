"""A trained model with its tokenizer, sizes and run settings, for the commands that use one.

It comes from a checkpoint, which records all of these; from a Hugging Face folder, which has no run; or from a `.pth`
file, which has the weights alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from colonnade.checkpoint.discover import is_hugging_face_folder
from colonnade.checkpoint.hugging_face import load_hugging_face
from colonnade.checkpoint.load import load_model_and_optimizer
from colonnade.checkpoint.run_record import run_record
from colonnade.checkpoint.single_file import load_single_file
from colonnade.checkpoint.verify import verified
from colonnade.command_settings import TrainedModelSettings
from colonnade.config import check_contradictions, complete_settings
from colonnade.data.tokenization import puts_before
from colonnade.errors import UsageError
from colonnade.parallel.mesh import ParallelLayout
from colonnade.parallel.sharding import default_slices
from colonnade.run_settings import RunSettings
from colonnade.runtime.vote import on_first_rank, vote
from data_processing import boundary_tokens, vocabulary_size
from model import ModelConfig, TensorParallelModel
from run.data import require_vocabulary, run_tokenizer
from run.inputs import model_of_record, resolve_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainedModel:
    """A model that was found, and verified if it is a checkpoint; its weights are not read yet.

    Attributes:
        path: the checkpoint's folder, the Hugging Face folder, or the `.pth` file.
        step: optimizer steps taken; None for a Hugging Face folder, or if a `.pth` file does not say.
        record: what its manifest says about the run (`run_record`); empty for anything but a checkpoint.
        is_hugging_face: whether `path` is a Hugging Face folder.
        settings: the run's settings; for anything but a checkpoint, the given settings and defaults.
    """

    path: Path
    step: int | None
    record: Mapping[str, Any]
    is_hugging_face: bool
    settings: RunSettings
    config: ModelConfig
    tokenizer: PreTrainedTokenizerBase

    def load(
        self,
        layout: ParallelLayout,
        *,
        compute_dtype: torch.dtype | None = None,
        fixed_order: bool = False,
    ) -> TensorParallelModel:
        """Load the model with the checkpoint's weights, sharded over these ranks. Collective.

        Args:
            fixed_order: compute in slices and sum them in a fixed order, so that results are bit-identical at every tp
                that divides the number of slices; no effect at other sizes.

        Raises:
            UsageError: the model cannot be sharded over these ranks, or the weights have other sizes.
        """
        with vote():
            slices = default_slices(self.config)
            model = TensorParallelModel(
                self.config,
                layout,
                slices=slices if fixed_order and slices % layout.tp == 0 else None,
                compute_dtype=compute_dtype,
            )
            if not self.record:
                read = load_hugging_face if self.is_hugging_face else load_single_file
                read(self.path, model=model, vocabulary_size=self.config.vocab_size)
        if self.record:
            load_model_and_optimizer(self.path, model=model, optimizer=None)
        return model

    def special_token_ids(self) -> dict[str, int | None]:
        """Ids of the BOS, EOS and padding tokens, under their keys in a `config.json`.

        None if there is no such token: a missing key would take the default of the model family in `transformers`.
        """
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.settings.add_document_boundary_tokens:
            begin, end = boundary_tokens(self.tokenizer)
        pad = end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        return {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": pad}


def open_trained(named: TrainedModelSettings) -> TrainedModel:
    """Open the named model: a run's folder (its newest checkpoint), one checkpoint, a Hugging Face folder, or a `.pth`
    file. Collective.

    A `.pth` file needs a tokenizer, and either preset or model_config; everything else contains its own sizes.

    Raises:
        UsageError: there is none, it is damaged, or a setting or its tokenizer is missing or does not fit.
    """
    path, step = Path(named.checkpoint_path), None
    record: dict[str, Any] = {}
    is_hugging_face = on_first_rank(lambda: is_hugging_face_folder(path))
    if not is_hugging_face:
        found, _ = verified(path)
        path, step = found.path, found.step
    with vote():
        if not is_hugging_face:
            record = run_record(found)
        settings = _settings(named, path, record, is_hugging_face=is_hugging_face)
    config = on_first_rank(lambda: _config(settings, path, record, is_hugging_face=is_hugging_face))
    with vote():
        tokenizer = run_tokenizer(settings)
        require_vocabulary(settings, vocabulary_size(tokenizer), config)
    if is_hugging_face:  # begin texts as the tokenizer itself does
        begin = tokenizer.bos_token_id
        settings = settings.replace(add_document_boundary_tokens=begin is not None and puts_before(tokenizer, begin))
    return TrainedModel(path, step, record, is_hugging_face, settings, config, tokenizer)


def _config(settings: RunSettings, path: Path, record: Mapping[str, Any], *, is_hugging_face: bool) -> ModelConfig:
    if record:
        return model_of_record(path, record)
    if is_hugging_face:
        return ModelConfig.from_json(path, flag="--checkpoint-path")
    return resolve_model(settings)


def _settings(
    named: TrainedModelSettings, path: Path, record: Mapping[str, Any], *, is_hugging_face: bool
) -> RunSettings:
    """The settings of the model at `path`, completed with those of the command line. Raises UsageError."""
    given: dict[str, Any] = {name: getattr(named, name) for name in ("preset", "model_config", "tokenizer_path")}
    given = {name: value for name, value in given.items() if value is not None}
    sizes = named.preset or named.model_config
    if sizes and (record or is_hugging_face):
        flag = "--preset" if named.preset else "--model-config"
        raise UsageError(f"{path} has sizes of its own: leave out {flag} {sizes}")
    if record:
        settings = check_contradictions(RunSettings(**record["settings"]).replace(**given))
    elif is_hugging_face:
        settings = complete_settings({"tokenizer_path": str(path), **given, "init_from": str(path)})
    elif named.tokenizer_path is None or not sizes:
        raise UsageError(
            f"--checkpoint-path {path}: a single file names neither sizes nor a tokenizer; give --tokenizer-path, and "
            "--preset or --model-config"
        )
    else:
        settings = complete_settings(given)
    return settings.replace(trust_remote_code=named.trust_remote_code)
