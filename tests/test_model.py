"""The decoder on one rank against `transformers`, and its configuration."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, distribute_tensor
from transformers import LlamaConfig, LlamaForCausalLM

from colonnade.errors import UsageError
from colonnade.parallel.mesh import init_parallel
from colonnade.parallel.slices import local_part
from dense_reference import assert_gradients_equal, dense_logits, relative_error
from model import ModelConfig, TensorParallelModel

SMALL = ModelConfig(
    vocab_size=257,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)


@pytest.fixture(scope="module")
def layout(single_rank):
    return init_parallel(1, torch.device("cpu"))


def hugging_face_twin(model: TensorParallelModel) -> LlamaForCausalLM:
    """`transformers`' own Llama with the model's weights."""
    twin = LlamaForCausalLM(LlamaConfig(**model.config.to_dict(), attn_implementation="eager"))
    missing, unexpected = twin.load_state_dict(dict(model.full_parameters()), strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return twin


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
@pytest.mark.parametrize("slices", [None, 4])
def test_logits_and_gradients_equal_transformers(layout, changes, slices):
    config = dataclasses.replace(SMALL, **changes)
    model = TensorParallelModel(config, layout, seed=3, slices=slices)
    with torch.no_grad():  # biases start at zero, which would hide a missing one
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.to_local().normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    twin = hugging_face_twin(model)
    tokens = torch.randint(0, config.vocab_size, (3, 33), generator=torch.Generator().manual_seed(0))
    ids, labels = tokens[:, :-1], tokens[:, 1:]

    expected = twin(ids).logits
    assert relative_error(model.logits(ids), expected) <= 1e-5
    weights = {name: parameter.detach() for name, parameter in twin.named_parameters()}
    assert relative_error(dense_logits(weights, config.to_dict(), ids), expected) <= 1e-5

    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten(), reduction="sum")
    loss.backward()
    ours = model(ids, labels)
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert_gradients_equal(
        {name: parameter.grad.full_tensor() for name, parameter in model.named_parameters()},
        {name: parameter.grad for name, parameter in twin.named_parameters()},
    )


def test_residual_projections_start_smaller_with_depth(layout):
    config = dataclasses.replace(SMALL, num_hidden_layers=8, hidden_size=256, intermediate_size=512)
    std = {name: float(value.std()) for name, value in TensorParallelModel(config, layout).full_parameters()}
    assert std["model.layers.0.self_attn.q_proj.weight"] == pytest.approx(0.02, rel=0.05)
    assert std["model.layers.0.mlp.down_proj.weight"] == pytest.approx(0.02 / 4, rel=0.05)


def test_config_reads_a_hugging_face_folder(tmp_path):
    theirs = LlamaConfig(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=24,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=True,
    )
    theirs.save_pretrained(tmp_path)
    ours = ModelConfig.from_json(tmp_path)
    assert (ours.head_dim, ours.rope_theta, ours.rms_norm_eps, ours.tie_word_embeddings) == (24, 500000.0, 1e-5, True)
    assert ours.num_key_value_heads == 2
    assert ours.vocab_size == 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "rope type 'longrope'"),
        ({"model_type": "gemma"}, "model_type 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of 3"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": "big"}, "hidden_size is 'big'"),
        ({"num_hidden_layers": None}, "num_hidden_layers missing"),
    ],
)
def test_config_refuses_what_it_would_get_wrong(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_dict() | changes))
    with pytest.raises(UsageError, match=message):
        ModelConfig.from_json(tmp_path)


class Constant(torch.autograd.Function):
    """What has no gradient to hand back."""

    @staticmethod
    def forward(ctx, x):
        return x.sum()

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_gradients_of_local_parts_are_those_of_to_local(layout):
    """Also where they are expanded, transposed, or none."""
    factor = torch.randn(4, 6)
    uses = {
        "expanded": torch.sum,
        "transposed": lambda part: (part.T * factor).sum(),
        "none": Constant.apply,
        "two uses": lambda part: (part * part).sum() + part[2].sum(),
    }
    value = torch.randn(6, 4)
    for name, use in uses.items():
        gradients = []
        for local in (local_part, lambda parameter: parameter.to_local()):
            parameter = nn.Parameter(distribute_tensor(value, layout.tp_mesh, [Replicate()]))
            use(local(parameter)).backward()
            gradients.append(parameter.grad)
        ours, theirs = gradients
        if name == "none":
            assert ours is None
            assert theirs is None or not theirs.full_tensor().any()  # torch 2.11 makes zeros of it
            continue
        assert torch.equal(ours.to_local(), theirs.to_local()), name
        assert ours.to_local().is_contiguous()
        ours.mul_(2.0)
