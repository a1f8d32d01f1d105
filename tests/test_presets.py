"""The presets' sizes, counted by `transformers`."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from colonnade.checkpoint.hugging_face_export import hugging_face_config
from colonnade.config import PRESET_FOLDER, complete_settings, load_preset, preset_names
from colonnade.model_config import ModelConfig
from colonnade.parallel.sharding import slice_counts

# Millions of parameters, with the vocabulary that the source trained with: by the names of the models, and where one
# says more, by its card (AICrossSim's 60M, 200M and 400M leave out the embeddings in their names).
MILLIONS = {
    "argonne-2b": (151936, 2884),
    "ernie-0.3b": (None, 361),
    "aixsim-60m": (49152, 82.1),
    "aixsim-200m": (49152, 262),
    "aixsim-400m": (49152, 456),
    "aixsim-600m": (49152, 680),
    "aixsim-1.1b": (49152, 1145),
    "simple-llama-1.3b": (32000, 1345),
    "llama3-8b": (None, 8030),
    "tiny": (4096, 1.26),
}


def sizes_of(name: str) -> ModelConfig:
    return ModelConfig.from_dict(load_preset(name)[0], vocab_size=MILLIONS[name][0])


def test_every_preset_is_counted() -> None:
    assert set(preset_names()) == MILLIONS.keys()


@pytest.mark.parametrize("name", MILLIONS)
def test_the_parameters_are_as_many_as_transformers_makes(name: str) -> None:
    config = sizes_of(name)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(hugging_face_config(config))
    count = sum(parameter.numel() for parameter in theirs.parameters())
    assert count == config.num_parameters
    assert count / 1e6 == pytest.approx(MILLIONS[name][1], rel=0.005)


@pytest.mark.parametrize(
    ("name", "millions"), [("60m", 60), ("200m", 200), ("400m", 400), ("600m", 600), ("1.1b", 1100)]
)
def test_the_aixsim_feed_forward_is_rounded_as_its_source_does(name: str, millions: int) -> None:
    config = sizes_of(f"aixsim-{name}")
    inner = int(int(2 * 4 * config.hidden_size / 3) * 1.3)
    assert 0 <= config.intermediate_size - inner < 128
    assert config.intermediate_size % 128 == 0
    without = config.num_parameters - 2 * config.vocab_size * config.hidden_size
    assert without / 1e6 == pytest.approx(millions, rel=0.27)


@pytest.mark.parametrize("name", MILLIONS)
def test_a_preset_names_its_source_and_can_be_trained(name: str) -> None:
    first = (PRESET_FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    assert complete_settings({"preset": name}).block_size is not None
    assert slice_counts(sizes_of(name), (1, 2, 3, 4, 5, 8))[0] == 1
