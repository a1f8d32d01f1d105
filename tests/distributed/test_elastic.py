"""A checkpoint of any layout of ranks, restored at any other: the real model and its optimizer, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from colonnade.checkpoint.load import load_model_and_optimizer
from colonnade.checkpoint.save import save_checkpoint
from colonnade.checkpoint.verify import verified
from colonnade.optim.step import optimizer_step
from colonnade.telemetry.fingerprint import fingerprint_of
from distributed.workers import build, make_optimizer, tokens_for
from model import ModelConfig

LAYOUTS = [(tp, dp) for tp in (1, 2, 4) for dp in (1, 2)]
CONFIG = ModelConfig(
    vocab_size=131,  # prime: padded to 256 rows, of which the last rank of two and the last two of four hold no token
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,  # fewer than four ranks: each pair holds the same head
    head_dim=8,
    max_position_embeddings=32,
)


def everything(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Whole parameters and optimizer state by name, from torch's own gathering. Collective."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in {"": parameter, **optimizer.state[parameter]}.items():
            found[f"{name} {key}"] = (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
    return found


def steps_taken(config: ModelConfig, tp: int, steps: int, seed: int, kind: str, **options: Any) -> tuple[Any, Any, Any]:
    layout, model = build(config, tp, seed=seed, **options)
    optimizer = make_optimizer(kind, model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    ids, labels = tokens_for(config, 4, 16)
    share = torch.cat([ids, labels[:, -1:]], dim=1)[layout.dp_rank :: layout.dp]
    for _ in range(steps):
        optimizer_step(
            model,
            optimizer,
            scaler,
            share,
            accumulation=1,
            targets=4 * 16,
            max_grad_norm=0.5,
        )
    return layout, model, optimizer


def save_at(config: ModelConfig, tp: int, folder: Path, kind: str = "adamw", **options: Any) -> dict[str, str]:
    """Three steps at this layout; a checkpoint, and beside it the whole tensors as a file of torch alone."""
    layout, model, optimizer = steps_taken(config, tp, 3, seed=1, kind=kind, **options)
    whole = everything(model, optimizer)
    if layout.is_main:
        folder.mkdir()
        torch.save(whole, folder / "whole.pt")
    save_checkpoint(folder / "run", 3, model=model, optimizer=optimizer, manifest={})
    taken = fingerprint_of(model, optimizer)
    return {**taken.tensors, **taken.moments}


def load_all(
    config: ModelConfig, tp: int, folders: list[Path], kind: str = "adamw", **options: Any
) -> list[dict[str, str]]:
    """Restore each checkpoint into a model of other weights that has stepped; its fingerprints."""
    _, model, optimizer = steps_taken(config, tp, 1, seed=2, kind=kind, **options)
    found = []
    for folder in folders:
        info, _ = verified(folder / "run")
        load_model_and_optimizer(info.path, model=model, optimizer=optimizer)
        expected = torch.load(folder / "whole.pt", weights_only=True)
        actual = everything(model, optimizer)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(actual[name], value), f"{folder.name} restored at tp {tp}: {name}"
            assert actual[name].dtype == value.dtype
        taken = fingerprint_of(model, optimizer)
        assert not taken.drifted
        found.append({**taken.tensors, **taken.moments})
    return found


def test_saved_at_any_layout_and_restored_at_any_other(rank_pool: Any, tmp_path: Path) -> None:
    folders = [tmp_path / f"tp{tp}-dp{dp}" for tp, dp in LAYOUTS]
    saved = [
        rank_pool.run(tp * dp, save_at, CONFIG, tp, folder)[0]
        for (tp, dp), folder in zip(LAYOUTS, folders, strict=True)
    ]
    # Each layout trained weights of its own, which differ in their last bits: a mix-up of checkpoints would show.
    assert len({str(fingerprints) for fingerprints in saved}) > 3
    for tp, dp in LAYOUTS:
        for rank, restored in enumerate(rank_pool.run(tp * dp, load_all, CONFIG, tp, folders)):
            assert restored == saved, f"rank {rank} of tp {tp} x dp {dp}"
