"""The model card of an exported model: usage, sizes, training data, results and training settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from colonnade.data.mixture import parse_data_glob
from colonnade.errors import UsageError
from colonnade.setting_values import without_credentials
from colonnade.telemetry.code_version import describe_code
from colonnade.telemetry.metrics import read_metrics
from colonnade.telemetry.report import METRICS_NAME

if TYPE_CHECKING:
    from run.trained_model import TrainedModel


def model_card(trained: TrainedModel, parameters: int, dtype: str, name: str) -> str:
    """The text of a README.md, with the metadata that the Hugging Face hub reads."""
    from huggingface_hub import ModelCardData

    metadata = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["colonnade"])
    config = trained.config
    origin = "pretrained" if trained.record else "exported"
    sections = [
        f"---\n{metadata.to_yaml()}\n---\n\n# {name}",
        f"A decoder-only language model of {parameters:,} parameters ({config.model_type}), {origin} with Colonnade.",
        "## Use\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n```',
        "## Sizes\n\n" + _table({**config.to_dict(), "weights": dtype}),
    ]
    if trained.record:
        sections += [
            "## Training data\n\n" + _data(trained),
            "## Results\n\n" + _table(_results(trained)),
            "## Training\n\n" + _table(_training(trained)),
        ]
    return "\n\n".join(sections) + "\n"


def _data(trained: TrainedModel) -> str:
    settings = trained.settings
    corpora = parse_data_glob(settings.data_glob) if settings.data_glob else []
    # A card is written to be published.
    lines = [
        f"- {corpus.name}: `{without_credentials(corpus.pattern)}`, weight {corpus.weight:g}" for corpus in corpora
    ]
    tokens = trained.record["tokens_seen"]
    return "\n".join([f"{tokens:,} tokens were seen, of:\n", *lines])


def _results(trained: TrainedModel) -> dict[str, Any]:
    """The last losses up to the checkpoint, in nats per token, from the run's log if it lies beside the checkpoint."""
    results = {"training loss": trained.record["loss"]}
    try:
        rows = read_metrics(trained.path.parent / METRICS_NAME)
    except UsageError:
        rows = []
    for row in rows:
        if type(row.get("step")) is int and row["step"] <= (trained.step or 0):
            for key, label in (("loss", "training loss"), ("validation_loss", "held-out loss")):
                if row.get(key) is not None:
                    results[label] = row[key]
    blocks, chunks = trained.settings.block_size, trained.settings.validation_chunks
    held_out = {f"held-out loss of the first {chunks} blocks of {blocks} tokens": results.pop("held-out loss", None)}
    if chunks == 0:
        held_out = {"held-out loss": next(iter(held_out.values()))}
    return {key: f"{value:.4f}" for key, value in {**results, **held_out}.items() if value is not None}


def _training(trained: TrainedModel) -> dict[str, Any]:
    record = trained.record
    facts: dict[str, Any] = {
        "steps": trained.step,
        "sequences a step": record["global_batch"],
        "ranks of the last start": f"tp {record['tp']} x dp {record['dp']}",
        "code": describe_code(record["code"]) if record["code"] is not None else None,
    }
    return facts | trained.settings.identity()


def _table(values: Mapping[str, Any]) -> str:
    shown = {key: f"{value:.6g}" if type(value) is float else value for key, value in values.items()}
    rows = [f"| {key} | {value} |" for key, value in shown.items() if value is not None]
    return "\n".join(["| | |", "| --- | --- |", *rows])
