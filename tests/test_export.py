"""Checkpoints as Hugging Face folders and `.pth` files, read back by `transformers`, and the way in again."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from colonnade.checkpoint import hugging_face_export
from colonnade.checkpoint.hugging_face_export import hugging_face_config
from colonnade.command_settings import TrainedModelSettings
from colonnade.errors import RunError, UsageError
from colonnade.parallel.mesh import ParallelLayout, init_parallel
from data_helpers import EOS, tiny_tokenizer
from distributed.launching import losses, make_inputs
from foreign_models import FAMILIES, save_foreign_model
from forked_commands import start
from model import ModelConfig
from run.export import export_checkpoint, export_single_file
from run.trained_model import TrainedModel, open_trained

TEXT = "A colonnade is a row of columns that carry one roof together. " * 20


@pytest.fixture
def layout(single_rank: None) -> ParallelLayout:
    return init_parallel(1, torch.device("cpu"))


def opened(folder: Path, family: str, **changes: Any) -> tuple[TrainedModel, dict[str, torch.Tensor]]:
    """A `.pth` file with the weights of a model of the family, opened; and those weights."""
    theirs = save_foreign_model(folder / "theirs", family, vocab_size=450, **changes)
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    weights = theirs.state_dict()
    torch.save({"model_state_dict": weights}, folder / "weights.pth")
    path, sizes, tokenizer = (str(folder / name) for name in ("weights.pth", "theirs", "tokenizer"))
    trained = open_trained(TrainedModelSettings(path, model_config=sizes, tokenizer_path=tokenizer))
    return trained, weights


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_folder_holds_the_weights_it_came_from(layout: Any, tmp_path: Path, family: str) -> None:
    trained, weights = opened(tmp_path, family)
    said = export_checkpoint(trained, layout, tmp_path / "out", text=TEXT)
    assert "tokens of the text given" in said
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1, "all are as readable"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.config.model_type == trained.config.model_type
    found = theirs.state_dict()
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(found[name], value), name
    assert ModelConfig.from_json(tmp_path / "out") == trained.config
    ids = AutoTokenizer.from_pretrained(tmp_path / "out").encode(TEXT)
    assert ids == tiny_tokenizer().encode(TEXT)
    end = tiny_tokenizer().convert_tokens_to_ids(EOS)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == end


def test_a_hugging_face_folder_is_exported_again(layout: Any, tmp_path: Path) -> None:
    weights = save_foreign_model(tmp_path / "theirs", "qwen3", vocab_size=450).state_dict()
    tiny_tokenizer().save_pretrained(tmp_path / "theirs")
    trained = open_trained(TrainedModelSettings(str(tmp_path / "theirs")))
    export_checkpoint(trained, layout, tmp_path / "out", text=TEXT)
    assert "exported with Colonnade" in (tmp_path / "out" / "README.md").read_text()
    export_single_file(trained, layout, tmp_path / "out.pth", "float32")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    single = torch.load(tmp_path / "out.pth", weights_only=True)["model_state_dict"]
    for name, value in weights.items():
        assert torch.equal(found[name], value), name
        assert torch.equal(single[name], value), name


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_that_a_tokenizer_does_not_have_are_none(layout: Any, tmp_path: Path, family: str) -> None:
    """Ids 1 and 2, Llama's defaults, are letters of this tokenizer."""
    trained, _ = opened(tmp_path, family)
    bare = tiny_tokenizer()
    bare.bos_token = bare.eos_token = bare.pad_token = None
    trained = dataclasses.replace(trained, tokenizer=bare)
    export_checkpoint(trained, layout, tmp_path / "out", text=TEXT)
    for config in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").config,
        GenerationConfig.from_pretrained(tmp_path / "out"),
    ):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (None, None, None)


def test_parts_of_a_size_and_bf16(layout: Any, tmp_path: Path) -> None:
    trained, weights = opened(tmp_path, "llama")
    export_checkpoint(trained, layout, tmp_path / "out", dtype="bfloat16", max_shard_size="40KB", text=TEXT)
    parts = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(parts) > 2
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    for name, value in weights.items():
        assert torch.equal(found[name], value.bfloat16()), name


def test_a_folder_that_differs_is_not_left(layout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, _ = opened(tmp_path, "llama")
    save = hugging_face_export._save

    def damaged(file: Path, tensors: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        save(file, {**tensors, name: tensors[name] * 1.01})

    monkeypatch.setattr(hugging_face_export, "_save", damaged)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RunError, match=r"other logits .* they differ by .*e-0[123]"):
        export_checkpoint(trained, layout, tmp_path / "out", text=TEXT)
    assert sorted(tmp_path.iterdir()) == before


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_no_folder(layout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, _ = opened(tmp_path, "llama")
    monkeypatch.setattr(hugging_face_export, "save_file", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RunError, match=r"safetensors cannot be written: .*No space left on device"):
        export_checkpoint(trained, layout, tmp_path / "out", text=TEXT)
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_leaves_no_file(layout: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained, _ = opened(tmp_path, "llama")
    monkeypatch.setattr(torch, "save", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RunError, match=r"cannot be written: .*No space left on device"):
        export_single_file(trained, layout, tmp_path / "out.pth", "float32")
    assert sorted(tmp_path.iterdir()) == before


def test_a_single_file_out_and_in_again(layout: Any, tmp_path: Path) -> None:
    trained, weights = opened(tmp_path, "qwen2")
    export_single_file(trained, layout, tmp_path / "again.pth", "float32")
    content = torch.load(tmp_path / "again.pth", weights_only=True)
    assert content["model_state_dict"].keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(content["model_state_dict"][name], value), name
    assert ModelConfig.from_dict(content["model_config"]) == trained.config


def test_what_transformers_has_no_config_for_is_refused() -> None:
    config = ModelConfig(300, 64, 96, 2, 4, 2, 16, 64, model_type="qwen3", mlp_bias=True)
    with pytest.raises(UsageError, match="transformers' qwen3 has no mlp_bias True"):
        hugging_face_config(config)
    hugging_face_config(dataclasses.replace(config, mlp_bias=False))


# ------------------------------------------------------------------------------------------------- whole commands


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run in `run`, beside its inputs."""
    folder = tmp_path_factory.mktemp("export")
    flags = [*make_inputs(folder), "--total-steps", "6", "--initial-batch-size", "4", "--checkpoint-interval", "0"]
    (outcome,) = start("training", [*flags, "--checkpoint-dir", str(folder / "run")])
    assert outcome.code == 0, outcome
    return folder


@pytest.fixture(scope="module")
def exported(run_folder: Path) -> Path:
    """The run as a Hugging Face folder, exported by two ranks."""
    flags = ["--checkpoint-path", str(run_folder / "run"), "--output", str(run_folder / "hf")]
    outcomes = start("export_hf", flags, ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert "tokens of the run's data are within" in outcomes[0].output
    return run_folder / "hf"


def test_greedy_generation_is_that_of_transformers_on_the_exported_model(run_folder: Path, exported: Path) -> None:
    prompts = ["def ", "import os\nclass", "x"]
    (run_folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    flags = ["--prompts-file", str(run_folder / "prompts.jsonl")]
    flags += ["--max-new-tokens", "12", "--temperature", "0", "--batch-size", "2"]
    written = []
    for source, ranks in ((run_folder / "run", 1), (run_folder / "run", 2), (exported, 2)):
        output = run_folder / f"greedy_{source.name}_{ranks}.jsonl"
        these = [*flags, "--checkpoint-path", str(source), "--output", str(output)]
        outcomes = start("generate", these, ranks=ranks)
        assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes
        written.append([json.loads(line) for line in output.read_text().splitlines()])
    assert written[0] == written[1] == written[2]
    model: Any = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    for row, text in zip(written[0], prompts, strict=True):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        whole = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert row == {"prompt": text, "text": tokenizer.decode(whole, skip_special_tokens=True), "tokens": 12}


def test_the_model_card_tells_data_and_results(run_folder: Path, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert str(run_folder / "corpus" / "*.parquet") in card
    assert f"| training loss | {losses(run_folder / 'run')[6]:.4f} |" in card
    assert "pipeline_tag: text-generation" in card


def test_training_begins_with_the_weights_of_a_folder(run_folder: Path, exported: Path) -> None:
    """At a learning rate that moves nothing, what comes out is what went in; the tokenizer comes from the folder."""
    flags = ["--init-from", str(exported), "--data-glob", str(run_folder / "corpus" / "*.parquet")]
    flags += ["--checkpoint-dir", str(run_folder / "begun"), "--total-steps", "1", "--initial-batch-size", "4"]
    flags += ["--learning-rate", "1e-30", "--warmup-steps", "0", "--block-size", "64"]
    outcomes = start("training", flags, ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    files = len(list((run_folder / "corpus").glob("*.parquet")))
    lines = outcomes[0].output.splitlines()
    assert f"weights from {exported}" in lines
    assert any(line.startswith(f"data: {files} files; ") for line in lines), lines  # one corpus has no name
    back = ["--checkpoint-path", str(run_folder / "begun"), "--output", str(run_folder / "back.pth")]
    (outcome,) = start("export_hf", back)
    assert outcome.code == 0, outcome
    found = torch.load(run_folder / "back.pth", weights_only=True)
    assert found["global_step"] == 1
    theirs = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    assert found["model_state_dict"].keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.allclose(found["model_state_dict"][name], value, atol=1e-12), name


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("export_hf", ["--output", "{}/run"], "exists; move it away"),
        ("export_hf", ["--output", "{}/none/x"], "there is no folder"),
        ("export_hf", ["--output", "{}/x", "--dtype", "int8"], "int8"),
        ("export_hf", ["--output", "{}/x", "--max-shard-size", "5 gigabytes"], "whole number of KB, MB or GB"),
        ("export_hf", ["--output", "{}/x.pth", "--max-shard-size", "5MB"], "--max-shard-size 5MB is for a folder"),
        ("export_hf", ["--output", "{}/x.pth", "--text-file", "y"], "--text-file y is for a folder"),
        ("export_hf", ["--output", "{}/x", "--text-file", "{}/none"], "--text-file {}/none cannot be read"),
        ("export_hf", ["--output", "{}/x", "--preset", "tiny"], "has sizes of its own: leave out --preset tiny"),
        ("generate", [], "--prompt or --prompts-file: give one of them"),
        ("generate", ["--prompt", "x", "--batch-size", "2"], "--batch-size 2 is for the prompts of --prompts-file"),
        ("generate", ["--prompts-file", "{}/none"], "--prompts-file {}/none cannot be read"),
        ("generate", ["--prompt", "x", "--output", "{}/config.json"], "exists; move it away"),
        ("generate", ["--prompt", "x", "--top-p", "0"], "--top-p 0.0 must be above 0"),
        ("generate", ["--prompt", "x", "--max-new-tokens", "64"], "the model's context of 64; give at most"),
        ("training", ["--init-from", "{}/corpus"], "--init-from {}/corpus holds no config.json"),
        ("training", ["--init-from", "meta-llama/Llama-3.2-1B"], "not fetched: hf download NAME --local-dir FOLDER"),
        ("training", ["--init-from", "{}", "--tokenizer-path", "{}/tokenizer"], "holds neither model.safetensors"),
        ("training", ["--init-from", "{}", "--preset", "tiny"], "leave --preset out"),
    ],
)
def test_wrong_input_is_one_line(run_folder: Path, script: str, flags: list[str], message: str) -> None:
    before = sorted(run_folder.rglob("*"))
    placed = [flag.replace("{}", str(run_folder)) for flag in flags]
    if script == "training":
        placed += ["--data-glob", str(run_folder / "corpus" / "*.parquet"), "--checkpoint-dir", str(run_folder / "no")]
    else:
        placed = ["--checkpoint-path", str(run_folder / "run"), *placed]
    (outcome,) = start(script, placed)
    assert outcome.code == 2, outcome
    (line,) = outcome.errors.splitlines()[-1:]
    assert line.startswith(f"{script}.py: usage error: ")
    assert message.replace("{}", str(run_folder)) in line
    assert "Traceback" not in outcome.errors
    assert sorted(run_folder.rglob("*")) == before
