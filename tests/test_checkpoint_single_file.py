"""Weights from a `.pth` file on one rank; two ranks are covered with the other spawned checks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from checkpoint_reference import cut_model, local, mesh, values
from colonnade.checkpoint.single_file import load_single_file
from colonnade.errors import UsageError


@pytest.fixture(autouse=True, scope="module")
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write(path: Path, weights: dict[str, Any], **rest: Any) -> Path:
    torch.save({"model_state_dict": weights, **rest}, path)
    return path


def assert_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        assert torch.equal(local(parameter), expected[name]), name


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_names_with_wrappers_and_other_dtypes(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    whole = values(3, dtype=dtype)
    weights = {prefix + name: value for name, value in whole.items()}
    weights[f"{prefix}model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    path = write(
        tmp_path / "a.pth", weights, global_step=12, loss=2.5, args={"lr": 1e-3, "names": ["a"]}, rng=torch.ones(3)
    )
    model = cut_model(values(7), mesh())
    assert load_single_file(path, model=model) == 12
    assert_weights(model, {name: value.float() for name, value in whole.items()})


def test_a_vocabulary_without_padding(tmp_path: Path) -> None:
    whole = values(3)
    cut = {name: value[:7].clone() if value.shape[0] == 11 else value for name, value in whole.items()}
    path = write(tmp_path / "a.pth", cut, step=4)
    model = cut_model(values(7), mesh())
    assert load_single_file(path, model=model, vocabulary_size=7) == 4
    assert_weights(
        model, {n: torch.cat((v[:7], torch.zeros(4, 4))) if v.shape[0] == 11 else v for n, v in whole.items()}
    )
    with pytest.raises(UsageError, match=r"'model.embed_tokens.weight' has shape \(7, 4\) .* and \(11, 4\)"):
        load_single_file(path, model=model, vocabulary_size=8)


def test_tied_parameters(tmp_path: Path) -> None:
    whole = values(3)
    model = cut_model(values(7), mesh())
    model.get_submodule("lm_head").weight = model.get_submodule("model.embed_tokens").weight
    tied = whole | {"lm_head.weight": whole["model.embed_tokens.weight"]}
    load_single_file(write(tmp_path / "tied.pth", tied), model=model)
    assert_weights(model, tied)
    del tied["lm_head.weight"]
    load_single_file(write(tmp_path / "once.pth", tied), model=model)
    with pytest.raises(UsageError, match=r"'lm_head.weight' differs from 'model.embed_tokens.weight'"):
        load_single_file(write(tmp_path / "untied.pth", whole), model=model)


def test_what_does_not_fit_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    whole = values(3)
    model = cut_model(values(7), mesh())
    cases: list[tuple[dict[str, Any], str]] = [
        ({n: v for n, v in whole.items() if n != "model.norm.weight"}, r"no parameter 'model.norm.weight'"),
        (whole | {"extra.weight": torch.ones(2)}, r"'extra.weight' with shape \(2,\), this model has none"),
        (whole | {"lm_head.weight": torch.ones(12, 4)}, r"'lm_head.weight' has shape \(12, 4\) in .* and \(11, 4\)"),
        (whole | {"lm_head.weight": torch.ones(11, 3)}, r"'lm_head.weight' has shape \(11, 3\) in .* and \(11, 4\)"),
        (whole | {"model.norm.weight": torch.ones(3)}, r"'model.norm.weight' has shape \(3,\) in .* and \(4,\)"),
        (whole | {"model.norm.weight": 1.0}, r"'model.norm.weight' is a float"),
    ]
    for weights, message in cases:
        with pytest.raises(UsageError, match=message):
            load_single_file(write(tmp_path / "a.pth", weights), model=model)
        assert_weights(model, values(7))


class Malicious:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def test_a_file_that_would_run_code_is_refused_in_one_line(tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    path = write(tmp_path / "a.pth", values(3), note=Malicious(trace))
    model = cut_model(values(7), mesh())
    with pytest.raises(UsageError, match=r"a.pth is refused: it asks for \w+.mkdir, which could run code$") as caught:
        load_single_file(path, model=model)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    assert_weights(model, values(7))
    torch.load(path, weights_only=False)
    assert trace.exists()  # the file does what the test says it does


def test_other_files_are_refused(tmp_path: Path) -> None:
    model = cut_model(values(7), mesh())
    with pytest.raises(UsageError, match="is refused: it asks for"):
        load_single_file(write(tmp_path / "numpy.pth", values(3), loss=np.float64(1.0)), model=model)
    torch.save(values(3), tmp_path / "bare.pth")
    with pytest.raises(UsageError, match=r"has no 'model_state_dict'; it has 'model.embed_tokens.weight'"):
        load_single_file(tmp_path / "bare.pth", model=model)
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(UsageError, match="holds a list"):
        load_single_file(tmp_path / "list.pth", model=model)
    (tmp_path / "text.pth").write_text("not a checkpoint at all")
    with pytest.raises(UsageError, match=r"text.pth is"):
        load_single_file(tmp_path / "text.pth", model=model)
    with pytest.raises(UsageError, match=r"none.pth cannot be read"):
        load_single_file(tmp_path / "none.pth", model=model)
    whole = write(tmp_path / "cut.pth", values(3))
    os.truncate(whole, whole.stat().st_size // 2)
    with pytest.raises(UsageError, match=r"cut.pth is damaged"):
        load_single_file(whole, model=model)
