"""Models of other families, read from Hugging Face folders, against `transformers`' own classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from colonnade.checkpoint.hugging_face import load_hugging_face
from colonnade.errors import UsageError
from colonnade.parallel.mesh import init_parallel
from dense_reference import assert_gradients_equal, relative_error
from distributed.workers import elements_read, imported_loss_and_gradients
from foreign_models import FAMILIES, LLAMA3_SCALING, save_foreign_model
from model import ModelConfig, TensorParallelModel


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(rank_pool: Any, tmp_path: Path, family: str) -> None:
    theirs = save_foreign_model(tmp_path, family)
    tokens = torch.randint(0, theirs.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(5))
    ids, labels = tokens[:, :-1], tokens[:, 1:]
    expected = theirs(ids).logits
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for tp in (1, 2):
        ours = rank_pool.run(tp, imported_loss_and_gradients, tmp_path, tp, tokens)[0]
        assert relative_error(ours["logits"], expected.detach()) <= 1e-5, f"tp {tp}"
        assert float(ours["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
        assert_gradients_equal(ours["gradients"], gradients)


@pytest.mark.parametrize("family", ["qwen3", "ernie4_5", "smollm3"])
def test_fixed_slices_give_the_same_bits(rank_pool: Any, tmp_path: Path, family: str) -> None:
    theirs = save_foreign_model(tmp_path, family)
    tokens = torch.randint(0, theirs.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(5))
    options = {"slices": 4}
    expected = rank_pool.run(1, imported_loss_and_gradients, tmp_path, 1, tokens, **options)[0]
    for tp in (2, 4):
        actual = rank_pool.run(tp, imported_loss_and_gradients, tmp_path, tp, tokens, **options)[0]
        assert torch.equal(actual["loss"], expected["loss"]), f"tp {tp}"
        for name, value in expected["gradients"].items():
            assert torch.equal(actual["gradients"][name], value), f"{name} at tp {tp}"


def test_a_rank_reads_only_its_part(rank_pool: Any, tmp_path: Path) -> None:
    theirs = save_foreign_model(tmp_path, "llama", vocab_size=256, num_key_value_heads=4)
    whole = sum(parameter.numel() for parameter in theirs.parameters())
    for read, held in rank_pool.run(4, elements_read, tmp_path, 4):
        assert read == held
        assert read < 0.26 * whole


@pytest.fixture
def layout(single_rank: None) -> Any:
    return init_parallel(1, torch.device("cpu"))


def imported(folder: Path, layout: Any) -> TensorParallelModel:
    config = ModelConfig.from_json(folder)
    model = TensorParallelModel(config, layout)
    load_hugging_face(folder, model=model, vocabulary_size=config.vocab_size)
    return model


def test_parts_with_an_index_are_one_model(layout: Any, tmp_path: Path) -> None:
    theirs = save_foreign_model(tmp_path, "llama", max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    for name, value in imported(tmp_path, layout).full_parameters():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_sizes_that_a_config_leaves_out_are_its_familys(tmp_path: Path) -> None:
    """A `config.json` of a small Ernie, without what is at its default."""
    given: dict[str, Any] = {"vocab_size": 300, "hidden_size": 512, "intermediate_size": 96, "num_hidden_layers": 2}
    given |= {"num_attention_heads": 32, "max_position_embeddings": 32}
    for family in ("ernie4_5", "qwen2", "qwen3", "mistral", "smollm3"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **given, "sliding_window": None}))
        ours = ModelConfig.from_json(tmp_path)
        theirs = CONFIG_MAPPING[family](**given)
        for name in ("rms_norm_eps", "tie_word_embeddings", "num_key_value_heads", "initializer_range"):
            assert getattr(ours, name) == getattr(theirs, name), f"{name} of {family}"
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope type 'llama3' needs low_freq_factor"),
        ({"rope_scaling": {**LLAMA3_SCALING, "factor": "8"}}, "factor of the rope type 'llama3' is '8'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not supported"),
        ({"model_type": "gemma"}, "model_type 'gemma' is not supported; only 'llama' or 'mistral' or 'qwen2'"),
        ({"model_type": "mistral", "sliding_window": 16}, "sliding_window 16 below max_position_embeddings 64"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "type 'sliding_attention'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "not one of model_type 'smollm3'"),
        ({"no_rope_layers": [0]}, "no_rope_layers is"),
        ({"model_type": "qwen3", "num_attention_heads": "4"}, "num_attention_heads"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **changes}))
    with pytest.raises(UsageError, match=message) as refusal:
        ModelConfig.from_json(tmp_path)
    assert "\n" not in str(refusal.value)


def _without(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")


def _with(folder: Path, name: str, value: torch.Tensor) -> None:
    save_file(load_file(folder / "model.safetensors") | {name: value}, folder / "model.safetensors")


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: _without(folder, NORM), f"has no parameter '{NORM}'"),
        (lambda folder: _with(folder, "model.layers.9.x.weight", torch.ones(3)), "model.layers.9.x.weight"),
        (lambda folder: _with(folder, NORM, torch.ones(3)), rf"'{NORM}' has shape \(3,\)"),
        (lambda folder: _with(folder, "model.embed_tokens.weight", torch.ones(7, 8)), r"shape \(7, 8\)"),
        (lambda folder: _with(folder, NORM, torch.ones(3, dtype=torch.int8)), "shape"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 99), "is damaged"),
        (lambda folder: _cut(folder / "model.safetensors"), "is damaged"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_and_changes_nothing(
    layout: Any, tmp_path: Path, harm: Any, message: str
) -> None:
    save_foreign_model(tmp_path, "llama")
    config = ModelConfig.from_json(tmp_path)
    model = TensorParallelModel(config, layout, seed=1)
    before = {name: value.clone() for name, value in model.full_parameters()}
    harm(tmp_path)
    with pytest.raises(UsageError, match=message):
        load_hugging_face(tmp_path, model=model, vocabulary_size=config.vocab_size)
    for name, value in model.full_parameters():
        assert torch.equal(value, before[name]), name


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1000])


def test_only_weights_that_could_run_code_are_not_read(layout: Any, tmp_path: Path) -> None:
    save_foreign_model(tmp_path, "llama")
    shutil.move(tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"it holds pytorch_model.bin, which is not read"):
        imported(tmp_path, layout)
