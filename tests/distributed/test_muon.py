"""Muon: against torch's own on whole matrices, and to the bit at every number of ranks."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

import forked_commands
from colonnade.optim.muon import decayed_step, nesterov_update, newton_schulz, next_momentum
from colonnade.optim.optimizer import allocate_state
from colonnade.optim.whole_matrices import WholeMatrices
from colonnade.parallel.mesh import ParallelLayout, init_parallel
from dense_reference import dense_loss
from distributed.launching import make_inputs
from distributed.pool import RankPool
from distributed.step_workers import every_token, optimizer_steps
from distributed.test_bits import MODELS, STEPS, differing
from distributed.test_elastic import CONFIG as ELASTIC
from distributed.test_elastic import load_all, save_at
from distributed.test_parity import CONFIG
from distributed.workers import (
    build,
    deterministic_steps,
    make_optimizer,
    steps_with_a_bad_one,
    whole,
)
from model import ModelConfig, TensorParallelModel

# At tp 2 and 4 each rank holds the whole of its key and value matrices.
ONE_HEAD = MODELS["biases, one key/value head"]
# Four ranks that share out 6 rows of these hold 2, 2, 2 and none.
SIX_ROWS = dataclasses.replace(ONE_HEAD, head_dim=6)
NORM = "model.norm.weight"


def is_hidden(name: str, value: Tensor) -> bool:
    return value.ndim == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight"))


def torch_optimizers(parameters: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
    """torch's own Muon and AdamW over whole parameters."""
    hidden = [value for name, value in parameters.items() if is_hidden(name, value)]
    tables = [value for name, value in parameters.items() if value.ndim == 2 and not is_hidden(name, value)]
    vectors = [value for value in parameters.values() if value.ndim == 1]
    groups = [{"params": tables, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(hidden, lr=3e-3, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8),
    ]


def drawn(name: str, shape: torch.Size, step: int) -> Tensor:
    """A gradient that each rank can draw by itself."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 * step + sum(map(ord, name))))


def laid_out_as(parameter: Tensor, whole: Tensor, layout: ParallelLayout) -> Tensor:
    """A whole tensor as `DTensor` with the parameter's placements."""
    assert isinstance(parameter, DTensor)
    local = distribute_tensor(whole, layout.tp_mesh, parameter.placements[-1:]).to_local()
    if layout.shard_mesh is not None:  # its rows cut once more
        rank, count = layout.replica_mesh.get_local_rank(), layout.replica_mesh.size()
        chunks = local.chunk(count)
        local = chunks[rank] if rank < len(chunks) else local[:0]
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def steps_on_drawn_gradients(
    config: ModelConfig, tp: int, steps: int, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Whole parameters, and whole momenta, after steps on gradients drawn by name."""
    layout, model = build(config, tp, seed=3, **options)
    optimizer = make_optimizer("muon in bf16", model)  # as torch's own is
    allocate_state(optimizer)
    for step in range(steps):
        for name, parameter in model.named_parameters():
            gradient = drawn(name, parameter.shape, step)
            parameter.grad = laid_out_as(parameter, gradient, layout)
        optimizer.step()
    momenta = {
        name: optimizer.state[parameter]["momentum_buffer"].full_tensor()
        for name, parameter in model.named_parameters()
        if is_hidden(name, parameter)
    }
    return whole(model), momenta


@pytest.mark.parametrize("config", [CONFIG, ONE_HEAD, SIX_ROWS], ids=["cut", "key and value whole", "few rows"])
def test_updates_are_those_of_torch_on_whole_matrices(rank_pool: RankPool, config: ModelConfig) -> None:
    initial = rank_pool.run(1, steps_on_drawn_gradients, config, 1, 0)[0][0]
    leaves = {name: value.clone().requires_grad_() for name, value in initial.items()}
    optimizers = torch_optimizers(leaves)
    for step in range(4):
        for name, leaf in leaves.items():
            leaf.grad = drawn(name, leaf.shape, step)
        for optimizer in optimizers:
            optimizer.step()
    zero2, zero3 = {"shard": {"mode": "zero2"}}, {"shard": {"mode": "zero3"}}
    layouts: list[tuple[int, int, dict[str, Any]]] = [
        *((1, 1, {}), (2, 2, {}), (4, 4, {}), (4, 2, {}), (3, 1, {})),
        *((4, 2, zero2), (3, 1, zero3), (8, 1, {**zero3, "replicas": 2}), (8, 2, {**zero2, "replicas": 2})),
    ]
    if config is SIX_ROWS:
        layouts = layouts[-4:]
    for world_size, tp, options in layouts:
        for parameters, momenta in rank_pool.run(world_size, steps_on_drawn_gradients, config, tp, 4, **options):
            for name, leaf in leaves.items():
                torch.testing.assert_close(parameters[name], leaf.detach(), rtol=1e-6, atol=1e-7)
                if is_hidden(name, leaf):
                    expected = optimizers[0].state[leaf]["momentum_buffer"]
                    torch.testing.assert_close(momenta[name], expected, rtol=1e-6, atol=1e-7)
                    assert float((leaf.detach() - initial[name]).abs().mean()) > 1e-3, "nothing to compare"


@pytest.mark.parametrize("mode", [None, "zero2", "zero3"])
def test_a_dense_model_trains_alike(rank_pool: RankPool, mode: str | None) -> None:
    """Gradients of the same model written out on whole weights; bfloat16 in the iterations rounds what differs."""
    steps = 6
    options: dict[str, Any] = {"kind": "muon in bf16", "seed": 5, "shard": None if mode is None else {"mode": mode}}
    layouts = [(1, 1), (4, 2)] if mode is None else [(4, 2)]
    found = [rank_pool.run(ranks, optimizer_steps, CONFIG, tp, steps, **options)[0] for ranks, tp in layouts]
    initial = found[0]["initial"]
    leaves = {
        name: (value[: CONFIG.vocab_size] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else value)
        .clone()
        .requires_grad_()
        for name, value in initial.items()
    }
    optimizers = torch_optimizers(leaves)
    ids, labels = every_token(CONFIG, 8)
    losses = []
    for _ in range(steps):
        loss = dense_loss(leaves, CONFIG.to_dict(), ids, labels) / (labels != -100).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(leaves.values()), 0.5)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    for result in found:
        torch.testing.assert_close(result["losses"], losses, rtol=1e-4, atol=0.0)
        for name, leaf in leaves.items():
            moved = leaf.detach() - initial[name][: leaf.shape[0]]
            difference = result["parameters"][name][: leaf.shape[0]] - leaf.detach()
            assert float(difference.norm()) < 0.1 * float(moved.norm()), name
    assert float(losses[-1]) < float(losses[0])


SHAPES = {
    "untied, odd vocabulary": [(2, 2), (4, 4), (4, 2), (2, 1)],
    "biases, one key/value head": [(4, 4), (4, 2)],
    "odd sizes": [(4, 2)],
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_number_of_ranks_trains_to_the_same_bits(rank_pool: RankPool, name: str) -> None:
    options: dict[str, Any] = {"slices": 8, "compute_dtype": torch.bfloat16, "seed": 2}
    options["kind"] = "muon in bf16" if name == "odd sizes" else "muon"
    expected = rank_pool.run(1, deterministic_steps, MODELS[name], 1, STEPS, **options)[0]
    assert len(set(expected["bits"])) == STEPS, "training stands still"
    for world_size, tp in SHAPES[name]:
        results = rank_pool.run(world_size, deterministic_steps, MODELS[name], tp, STEPS, **options)
        assert not differing(expected, results), f"tp {tp}, dp {world_size // tp}"


@pytest.mark.parametrize(
    ("name", "mode", "ranks", "tp", "replicas", "dtype"),
    [
        ("untied, odd vocabulary", "zero2", 4, 2, 1, torch.float32),
        ("untied, odd vocabulary", "zero3", 4, 1, 2, torch.float16),  # a loss scale, and a step that is skipped
        ("biases, one key/value head", "zero3", 8, 2, 2, torch.bfloat16),
        ("odd sizes", "zero2", 8, 2, 1, torch.bfloat16),  # rows that do not divide
    ],
)
def test_matrices_that_are_shared_out_keep_their_bits(
    rank_pool: RankPool, name: str, mode: str, ranks: int, tp: int, replicas: int, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"slices": 8, "compute_dtype": dtype, "seed": 2, "kind": "muon"}
    shard = {"mode": mode, "fixed_order": True}
    expected = rank_pool.run(1, deterministic_steps, MODELS[name], 1, STEPS, **options)[0]
    results = rank_pool.run(
        ranks, deterministic_steps, MODELS[name], tp, STEPS, shard=shard, replicas=replicas, **options
    )
    assert not differing(expected, results)


@pytest.mark.parametrize(
    "options",
    [
        {"fused": True, "deterministic": True, "slices": 4},
        {"fused": False, "deterministic": True, "slices": 4},
        {"shard": {"mode": "zero3"}},
    ],
    ids=["fused", "each operation", "shared out"],
)
def test_a_skipped_step_leaves_everything_as_it_was(rank_pool: RankPool, options: dict[str, Any]) -> None:
    options = {"bad": 2, "kind": "muon", **options}
    without = rank_pool.run(4, steps_with_a_bad_one, CONFIG, 2, poison=None, **options)
    # A matrix is spoiled in the copy that micro-batches use, and of shared-out parameters there is none.
    poison = NORM if "shard" in options else "model.layers.0.mlp.up_proj.weight"
    for rank, result in enumerate(rank_pool.run(4, steps_with_a_bad_one, CONFIG, 2, poison=poison, rank=1, **options)):
        assert result["skipped"] == [0, 0, 1, 0, 0]
        assert result["kept"], f"rank {rank}"
        for left, right in zip(result["tensors"], without[rank]["tensors"], strict=True):
            assert torch.equal(left, right), f"rank {rank}"


def refusal_of_another_layout(config: ModelConfig) -> str:
    layout, model = build(config, 1, shard={"mode": "zero3"})
    assert layout.shard_mesh is not None
    parameter = model.model.layers[0].mlp.down_proj.weight
    WholeMatrices(layout).check(parameter)
    try:
        WholeMatrices(dataclasses.replace(layout, shard_mesh=None)).check(parameter)
    except ValueError as error:
        return str(error)
    return "taken"


def test_matrices_that_lie_otherwise_than_the_layout_are_refused(rank_pool: RankPool) -> None:
    expected = r"of a matrix of shape \(64, 96\) this rank holds \(32, 96\), and \(64, 96\) by the layout"
    for found in rank_pool.run(2, refusal_of_another_layout, CONFIG):
        assert re.fullmatch(expected, found)


def test_what_is_done_to_each_element_does_not_depend_on_where_a_part_ends() -> None:
    """The update's operations on parts that end in the middle of a vector register, and on the whole."""
    generator = torch.Generator().manual_seed(0)
    weight, buffer, gradient, direction = (torch.randn(4001, generator=generator) for _ in range(4))
    for lower in (torch.float32, torch.bfloat16):

        def updated(part: slice, dtype: torch.dtype = lower) -> Tensor:
            moved = next_momentum(buffer[part], gradient[part], 0.95)
            stepped = decayed_step(weight[part], direction[part].to(dtype), 3e-4, 6e-3)
            return torch.stack([moved, nesterov_update(gradient[part], moved, 0.95), stepped])

        for length in (1, 3, 7, 17, 50, 333, 1003):
            parts = [updated(slice(start, min(start + length, 4001))) for start in range(0, 4001, length)]
            assert torch.equal(torch.cat(parts, dim=1), updated(slice(None)))


def test_saved_at_one_layout_and_restored_at_another(rank_pool: RankPool, tmp_path: Path) -> None:
    saved = rank_pool.run(2, save_at, ELASTIC, 2, tmp_path / "run", "muon")[0]
    assert {name.rpartition(".")[2] for name in saved} == {"weight", "momentum_buffer", "exp_avg", "exp_avg_sq", "step"}
    shared: dict[str, Any] = {"shard": {"mode": "zero3"}}
    saved_shared = rank_pool.run(4, save_at, ELASTIC, 2, tmp_path / "shared", "muon", **shared)[0]
    folders = [tmp_path / "run", tmp_path / "shared"]
    for world_size, tp, options in [(1, 1, {}), (4, 4, {}), (4, 2, {}), (4, 1, shared), (2, 1, shared)]:
        for restored in rank_pool.run(world_size, load_all, ELASTIC, tp, folders, "muon", **options):
            assert restored == [saved, saved_shared], f"tp {tp}, {options}"


def test_state_is_allocated_without_a_step(single_rank: None) -> None:
    layout = init_parallel(1, torch.device("cpu"))
    model = TensorParallelModel(dataclasses.replace(CONFIG, num_hidden_layers=1), layout, seed=1)
    before = whole(model)
    optimizer = make_optimizer("muon", model)
    allocate_state(optimizer)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), before[name])
        state = optimizer.state[parameter]
        assert state.keys() == (
            {"momentum_buffer"} if is_hidden(name, parameter) else {"step", "exp_avg", "exp_avg_sq"}
        )
        assert not any(value.any() for value in state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (48, 96), (96, 48)])
def test_singular_values_come_near_one(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    found = left.T @ newton_schulz(matrix, dtype).float() @ right.T
    brought = found.diagonal()[values > 0.1 * values.max()]
    assert brought.numel() > 40
    assert float(brought.min()) > 0.6
    assert float(brought.max()) < 1.3
    # Singular vectors stay: in their basis nothing stands beside the diagonal.
    assert float((found - found.diagonal().diag()).norm()) < 0.05 * float(found.norm())


def test_a_run_is_audited_and_gone_on_with(tmp_path: Path) -> None:
    """Two ranks share the matrices out, one audits, two go on at tp 2; the optimizer changes, from weights alone."""

    def command(script: str, *flags: str, ranks: int = 1, code: int = 0) -> str:
        first, *_ = outcomes = forked_commands.start(script, list(flags), ranks=ranks)
        assert {outcome.code for outcome in outcomes} == {code}, outcomes
        return first.output + first.errors

    def rates(folder: str) -> dict[int, float]:
        rows = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        return {row["step"]: row["learning_rate"] for row in rows if "loss" in row}

    inputs = make_inputs(tmp_path)
    run = str(tmp_path / "run")
    given = (
        *("--deterministic", "--initial-batch-size", "2", "--checkpoint-interval", "2", "--fingerprint-interval", "2"),
        *("--tensor-parallel-size", "1", "--data-parallel-shard", "zero3"),
    )
    schedule = ("--optimizer", "muon", "--schedule", "wsd", "--decay-steps", "2", "--total-steps", "4")
    command("training", *inputs, *given, *schedule, "--checkpoint-dir", run, ranks=2)
    audited = command("audit_run", "--run", run, "--from-step", "2", "--to-step", "4")
    assert "steps 3 to 4 are the same to the bit" in audited
    assert rates("run")[4] == pytest.approx(1e-4 + 9e-4 * (1 - 0.5**0.5))

    longer = ("--checkpoint-path", run, "--total-steps", "6", "--checkpoint-dir")
    said = command("resume_pretrain_tensor", *longer, str(tmp_path / "longer"), "--keep-optimizer", ranks=2)
    assert "total_steps 4 -> 6" in said
    assert "scheduled learning rate of step 5 0.0001 -> 0.001" in said
    assert rates("longer") == pytest.approx({5: 1e-3, 6: 1e-4 + 9e-4 * (1 - 0.5**0.5)})

    other = (*longer, str(tmp_path / "other"), "--optimizer", "adamw")
    said = command("resume_pretrain_tensor", *other, "--keep-optimizer", code=2)
    assert "holds the state of muon, which --optimizer adamw has no use for; leave out one of them" in said
    assert not (tmp_path / "other").exists()
    said = command("resume_pretrain_tensor", *other, "--rewarmup-steps", "2")
    assert "optimizer muon -> adamw" in said
    assert rates("other") == pytest.approx({5: 5e-4, 6: 1e-4 + 9e-4 * (1 - 0.5**0.5)})
