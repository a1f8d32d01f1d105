"""The global gradient norm of large gradients, against float64."""

import pytest
import torch

from colonnade.optim.gradients import agreed_norm, clip_by_norm
from colonnade.parallel.collectives import TensorGroup
from colonnade.parallel.mesh import init_parallel

NO_FLAG = torch.tensor(False)


@pytest.fixture(scope="module")
def gradients():
    """Four million values in one tensor, where a float32 sum loses digits, and a small one held whole."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2048, 2048, generator=generator), True), (torch.randn(64, generator=generator), False)]


@pytest.fixture(scope="module")
def group(single_rank):
    return TensorGroup(init_parallel(1, torch.device("cpu")).tp_group)


def test_the_norm_of_large_gradients_is_exact_to_float32(group, gradients):
    expected = torch.cat([gradient.double().flatten() for gradient, _ in gradients]).norm()
    assert float(agreed_norm(gradients, group, NO_FLAG)[0]) == pytest.approx(float(expected), rel=1e-6)
    pieces = [(1, 4), (0, 1)]
    assert float(agreed_norm(gradients, group, NO_FLAG, pieces)[0]) == pytest.approx(float(expected), rel=1e-6)


def test_clipping_scales_as_torch_does(group, gradients):
    ours = [(gradient.clone(), cut) for gradient, cut in gradients]
    theirs = [torch.nn.Parameter(gradient) for gradient, _ in gradients]
    for parameter in theirs:
        parameter.grad = parameter.detach().double().float().clone()
    norm, _ = agreed_norm(ours, group, NO_FLAG)
    torch.nn.utils.clip_grads_with_norm_(theirs, 0.5, norm)
    clip_by_norm(ours, norm, 0.5)
    for (actual, _), parameter in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, parameter.grad)
