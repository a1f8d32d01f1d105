"""Parameters shared out over data-parallel ranks: the dense model's steps, the same bits, a rank's part of memory."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import forked_commands
from colonnade.errors import UsageError
from colonnade.model_config import ModelConfig
from colonnade.optim.idle_switches import idle_settings, idle_switches
from colonnade.optim.shard_limits import Ranks, check_shards, fewest_replicas, part_off_border
from colonnade.parallel.batch_tree import leaf_order, nodes_completed
from colonnade.parallel.mesh import connect_devices, init_parallel
from colonnade.run_settings import RunSettings
from distributed.launching import make_inputs
from distributed.pool import RankPool
from distributed.step_workers import optimizer_steps, step_after_trials
from distributed.test_bits import MODELS, differing, tree_of
from distributed.test_elastic import CONFIG as SMALL
from distributed.test_elastic import load_all, save_at
from distributed.test_parity import CONFIG, dense_trajectory
from distributed.workers import deterministic_steps, drift_of

MODES = ("zero2", "zero3")
CPU = torch.device("cpu")
LAYOUTS = [(4, 2, 1), (4, 1, 1), (4, 1, 2), (8, 2, 2)]  # ranks, tp, replicas


def groups_connected(tp: int, replicas: int) -> list[int]:
    """The sizes of the groups that a run on GPUs connects before it measures memory."""
    layout = dataclasses.replace(init_parallel(tp, CPU).sharded(replicas), device=torch.device("cuda"))
    sizes = []
    zeros = torch.zeros

    def reduce(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
        sizes.append(dist.get_world_size(group))

    with (
        mock.patch("torch.zeros", lambda *shape, device: zeros(*shape)),
        mock.patch("torch.cuda.synchronize"),
        mock.patch("torch.distributed.all_reduce", reduce),
    ):
        connect_devices(layout)
    assert sizes[::2] == sizes[1::2]  # a small sum and a large one
    return sorted(sizes[::2])


def test_every_group_connects_its_gpus(rank_pool: RankPool) -> None:
    assert rank_pool.run(8, groups_connected, 2, 2) == [[2, 2, 2, 4, 8]] * 8  # tp, replicas, shards, dp, all
    assert rank_pool.run(2, groups_connected, 2, 1) == [[2]] * 2  # tp is all
    assert rank_pool.run(1, groups_connected, 1, 1) == [[]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("ranks", "tp", "replicas"), LAYOUTS)
def test_steps_equal_dense(rank_pool: RankPool, ranks: int, tp: int, replicas: int, mode: str) -> None:
    for dtype in (torch.float64, torch.float32):
        if dtype == torch.float32 and (tp == 1 or replicas > 1):
            continue
        results = rank_pool.run(
            ranks, optimizer_steps, CONFIG, tp, 4, shard={"mode": mode}, replicas=replicas, param_dtype=dtype, seed=5
        )
        main = results[0]
        losses, parameters = dense_trajectory(CONFIG, main["initial"], dtype, 4)
        rtol = 1e-10 if dtype == torch.float64 else 2e-5
        for result in results:
            torch.testing.assert_close(result["losses"], losses, rtol=rtol, atol=0.0)
            assert result["norms"] == main["norms"]
            assert torch.equal(result["logits"], main["logits"])
        if dtype == torch.float64:
            for name, value in parameters.items():
                assert float((main["parameters"][name][: value.shape[0]] - value).abs().max()) <= 1e-9, name
    # Two blocks and the rest of the model, in two micro-batches. zero3 brings a block together for its backward pass
    # again.
    assert main["counts"] == {"zero2": (3, 3), "zero3": (2 * 5, 2 * 3)}[mode]


def test_blocks_whose_collectives_overlap_equal_dense(rank_pool: RankPool) -> None:
    options: dict[str, Any] = {"sequence_parallel": True, "overlap_collectives": True, "param_dtype": torch.float64}
    main = rank_pool.run(4, optimizer_steps, CONFIG, 2, 3, shard={"mode": "zero3"}, seed=5, **options)[0]
    losses, parameters = dense_trajectory(CONFIG, main["initial"], torch.float64, 3)
    torch.testing.assert_close(main["losses"], losses, rtol=1e-10, atol=0.0)
    for name, value in parameters.items():
        assert float((main["parameters"][name][: value.shape[0]] - value).abs().max()) <= 1e-9, name


def test_a_rank_holds_its_part(rank_pool: RankPool) -> None:
    whole = rank_pool.run(1, optimizer_steps, CONFIG, 1, 1, seed=5)[0]["bytes"]
    for ranks, replicas, shards in ((4, 1, 4), (4, 2, 2)):
        for mode in MODES:
            results = rank_pool.run(ranks, optimizer_steps, CONFIG, 1, 1, 1, shard={"mode": mode}, replicas=replicas)
            assert {result["bytes"] for result in results} == {(whole[0] // shards, whole[1] // shards)}


@pytest.mark.parametrize(
    ("name", "mode", "ranks", "tp", "replicas", "options"),
    [
        ("untied, odd vocabulary", "zero2", 4, 2, 1, {}),
        ("untied, odd vocabulary", "zero3", 4, 2, 1, {"compute_dtype": torch.bfloat16}),
        ("untied, odd vocabulary", "zero2", 4, 1, 2, {}),
        ("tied", "zero3", 4, 1, 1, {"activation_checkpointing": "full"}),
        ("biases, one key/value head", "zero3", 4, 1, 2, {"activation_checkpointing": "full"}),
        # Parts of unequal size, and none on the last rank; a loss scale, and a step that is skipped.
        ("odd sizes", "zero3", 8, 2, 1, {"compute_dtype": torch.float16}),
    ],
)
def test_the_bits_of_a_run_without_shards(
    rank_pool: RankPool, name: str, mode: str, ranks: int, tp: int, replicas: int, options: dict[str, Any]
) -> None:
    options = {"slices": 8, "seed": 2, **options}
    shard = {"mode": mode, "fixed_order": True}
    expected = rank_pool.run(1, deterministic_steps, MODELS[name], 1, 3, **options)[0]
    results = rank_pool.run(ranks, deterministic_steps, MODELS[name], tp, 3, shard=shard, replicas=replicas, **options)
    assert not differing(expected, results)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 8, 12, 40])
def test_a_stack_adds_up_the_tree(count: int) -> None:
    """The reference is the tree written out as nested pairs."""
    stack: list[Any] = []
    for leaf, completed in zip(leaf_order(range(count)), nodes_completed(count), strict=True):
        stack.append(leaf)
        for _ in range(completed):
            right = stack.pop()
            stack[-1] = (stack[-1], right)
    assert stack == [tree_of(list(range(count)))]


def test_blocks_gathered_in_bf16_train_as_replicated_ones(rank_pool: RankPool) -> None:
    options = {"compute_dtype": torch.bfloat16, "seed": 5}
    replicated = rank_pool.run(4, optimizer_steps, CONFIG, 2, 6, **options)[0]
    exact = rank_pool.run(4, optimizer_steps, CONFIG, 2, 6, seed=5)[0]
    lower = {"mode": "zero3", "gather_dtype": torch.bfloat16}
    found = rank_pool.run(4, optimizer_steps, CONFIG, 2, 6, shard=lower, **options)[0]
    rounding = max(abs(a - b) for a, b in zip(replicated["losses"], exact["losses"], strict=True))
    assert rounding > 0
    for actual, expected in zip(found["losses"], replicated["losses"], strict=True):
        assert abs(actual - expected) <= rounding


@pytest.mark.parametrize("mode", MODES)
def test_trials_compute_alone_and_leave_nothing_behind(rank_pool: RankPool, mode: str) -> None:
    arguments: dict[str, Any] = {"shard": {"mode": mode}, "seed": 5}
    expected = rank_pool.run(2, step_after_trials, CONFIG, 1, None, **arguments)
    results = rank_pool.run(2, step_after_trials, CONFIG, 1, 1, **arguments)
    assert [result.pop("failures") for result in results] == [0, 1]
    assert [result.pop("failures") for result in expected] == [0, 0]
    assert results == expected
    plain = rank_pool.run(2, optimizer_steps, CONFIG, 1, 1, seed=5, activation_checkpointing="full")[0]
    assert results[0]["loss"] == pytest.approx(float(plain["losses"][0]), rel=1e-6)
    assert results[0]["norm"] == pytest.approx(plain["norms"][0], rel=1e-6)


def test_a_checkpoint_is_restored_with_and_without_shards(rank_pool: RankPool, tmp_path: Path) -> None:
    kinds: list[tuple[int, int, dict[str, Any]]] = [
        (2, 2, {}),
        (4, 2, {"shard": {"mode": "zero3"}}),
        (4, 1, {"shard": {"mode": "zero2"}, "replicas": 2}),
    ]
    folders = [tmp_path / str(number) for number in range(len(kinds))]
    saved = [
        rank_pool.run(ranks, save_at, SMALL, tp, folder, **options)[0]
        for (ranks, tp, options), folder in zip(kinds, folders, strict=True)
    ]
    assert len({str(fingerprints) for fingerprints in saved}) > 2
    for ranks, tp, options in kinds:
        for restored in rank_pool.run(ranks, load_all, SMALL, tp, folders, **options):
            assert restored == saved, (tp, options)


def test_replicas_that_differ_are_told_with_their_ranks(rank_pool: RankPool) -> None:
    cut, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    options: dict[str, Any] = {"shard": {"mode": "zero3"}, "replicas": 2}
    results = rank_pool.run(8, drift_of, CONFIG, 2, [(cut, 5), (norm, 2)], **options)
    before, after = results[0]
    assert results == results[:1] * 8
    assert before.drifted == {}
    assert after.drifted == {
        cut: "ranks 1 and 5 differ, and no majority tells which is right",
        norm: "rank 2 differs from the 3 others",
    }
    assert rank_pool.run(1, drift_of, CONFIG, 1, [])[0][0] == before


# ------------------------------------------------------------------------------------------------------- whole runs


def rows_of(directory: Path) -> dict[int, dict[str, Any]]:
    """The metrics of each step, of which its loss and its validation loss."""
    rows: dict[int, dict[str, Any]] = {}
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "step" in row and "started" not in row:
            rows.setdefault(row["step"], {}).update(row)
    return rows


def results_of(directory: Path) -> dict[int, tuple[Any, ...]]:
    keys = ("loss_bits", "grad_norm_bits", "fingerprint", "moments_fingerprint", "validation_loss", "samples")
    return {step: tuple(row.get(key) for key in keys) for step, row in rows_of(directory).items()}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("inputs")
    inputs = make_inputs(folder)
    (folder / "prompts").write_text("def\nimport torch\n")
    return [
        *inputs,
        *("--total-steps", "6", "--checkpoint-interval", "3", "--initial-batch-size", "2", "--deterministic"),
        *("--gradient-accumulation-steps", "4", "--validation-glob", inputs[1], "--validation-chunks", "6"),
        *("--sample-interval", "3", "--sample-tokens", "4", "--sample-prompts", str(folder / "prompts")),
    ]


def test_a_run_under_zero3_is_the_run_of_one_rank_and_goes_on_there(flags: list[str], tmp_path: Path) -> None:
    """Validation has three batches, which two ranks cannot share out evenly."""
    alone, sharded = tmp_path / "alone", tmp_path / "sharded"
    (outcome,) = forked_commands.start("training", [*flags, "--checkpoint-dir", str(alone)])
    assert outcome.code == 0, outcome
    over_two = ["--tensor-parallel-size", "1", "--data-parallel-shard", "zero3", "--gradient-accumulation-steps", "2"]
    outcomes = forked_commands.start("training", [*flags, *over_two, "--checkpoint-dir", str(sharded)], ranks=2)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert "zero3: parameters cut into 2 over dp" in outcomes[0].output
    expected = results_of(alone)
    assert [step for step, found in expected.items() if found[2]] == [3, 6]
    assert expected[6][4] is not None
    assert expected[6][5] is not None
    assert results_of(sharded) == expected
    (audited,) = forked_commands.start("audit_run", ["--run", str(sharded), "--from-step", "2", "--to-step", "5"])
    assert audited.code == 0, audited
    assert "the same to the bit" in audited.output
    shutil.rmtree(sharded / "streaming_checkpoint_step_6")
    (outcome,) = forked_commands.start("training", [*flags, "--checkpoint-dir", str(sharded)])
    assert outcome.code == 0, outcome
    assert "(step 3), exactly as it stopped" in outcome.output
    assert results_of(sharded) == expected


def ranks_of(dp: int, tp: int = 1) -> Ranks:
    return Ranks(dp, tp, CPU)


@pytest.mark.parametrize(
    ("changes", "config", "ranks", "message"),
    [
        ({"data_parallel_replicate_size": 3}, {}, ranks_of(4), "size 3 does not divide the 4 .* that do: 1, 2, 4$"),
        (
            {"data_parallel_replicate_size": 2},
            {},
            ranks_of(1, 2),
            "groups data-parallel ranks, and there is one: leave",
        ),
        ({"cuda_graphs": True}, {}, ranks_of(2), "zero3 and --cuda-graphs: .*; leave out one of them"),
        ({}, {}, ranks_of(4, 3), "padded vocabulary of 512 is cut unevenly over 3"),
        (
            {"deterministic": True},
            {},
            ranks_of(8),
            "in 8 parts model.norm.weight has other bits .*--data-parallel-repl",
        ),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    changes: dict[str, Any], config: dict[str, Any], ranks: Any, message: str
) -> None:
    settings = RunSettings(data_parallel_shard="zero3", **changes)
    with pytest.raises(UsageError, match=message):
        check_shards(settings, dataclasses.replace(CONFIG, vocab_size=500, **config), ranks)


@pytest.mark.parametrize(
    ("changes", "ranks", "micro_batch", "says"),
    [
        ({"data_parallel_shard": "zero2"}, (1, 2), 4, []),
        (
            {"data_parallel_shard": "zero2"},
            (2, 1),
            4,
            ["nothing to share out: at tp 2 x dp 1 .*a smaller --tensor-par"],
        ),
        ({"data_parallel_shard": "zero3"}, (1, 1), 4, ["nothing to share out: at tp 1 x dp 1 .*it takes more ranks$"]),
        (
            {"data_parallel_shard": "zero2", "data_parallel_replicate_size": 2},
            (2, 2),
            4,
            ["zero2 has nothing to share out: at tp 2 x dp 2 .*a --data-parallel-replicate-size below 2"],
        ),
        ({"sequence_parallel": True, "overlap_collectives": True}, (2, 1), 4, []),
        (
            {"sequence_parallel": True, "overlap_collectives": True},
            (1, 2),
            4,
            ["--sequence-parallel changes nothing at tp 1", "--overlap-collectives changes nothing at tp 1"],
        ),
        ({"sequence_parallel": True, "overlap_collectives": True, "deterministic": True}, (1, 2), 4, []),
        ({"replicate_embeddings": True}, (1, 1), 4, ["--replicate-embeddings changes nothing at tp 1"]),
        ({"replicate_embeddings": True}, (2, 1), 4, []),
        ({"overlap_collectives": True}, (2, 1), 1, ["--overlap-collectives changes nothing at a micro-batch of one"]),
    ],
)
def test_switches_that_have_nothing_to_do_are_told(
    changes: dict[str, Any], ranks: tuple[int, int], micro_batch: int, says: list[str]
) -> None:
    found = idle_switches(RunSettings(**changes), *ranks, micro_batch)
    assert len(found) == len(says)
    for line, pattern in zip(found, says, strict=True):
        assert re.search(pattern, line)


@pytest.mark.parametrize(
    ("changes", "names", "needed"),
    [
        ({"sample_prompts": "p", "sample_tokens": 5, "sample_temperature": 0.0}, 3, {"sample_interval": 9}),
        ({"validation_interval": 3, "validation_chunks": 2}, 2, {"validation_glob": "v"}),
        ({"spike_window": 50}, 1, {"spike_sigma": 4.0}),
        ({"keep_every": 100, "checkpoint_interval": 0}, 1, {"checkpoint_interval": 50}),
        ({"memory_limit_gib": 2.0, "deterministic": True}, 1, {"deterministic": False}),
    ],
)
def test_settings_that_have_nothing_to_do_are_told(changes: dict[str, Any], names: int, needed: dict[str, Any]) -> None:
    found = idle_settings(RunSettings(**changes))
    assert len(found) == names
    assert all(" does nothing with" in line for line in found)
    assert idle_settings(RunSettings(**{**changes, **needed})) == []


def test_parts_that_keep_bits_are_allowed() -> None:
    assert part_off_border(CONFIG, 1, 8, 4) is None
    assert part_off_border(CONFIG, 1, 8, 8) == "model.norm.weight"
    # No slice of these ends on a register's border: the update is the unfused one.
    assert part_off_border(MODELS["odd sizes"], 1, 8, 4) is None


@pytest.mark.parametrize(
    ("settings", "config", "ranks", "replicas"),
    [
        (RunSettings(), CONFIG, ranks_of(4), 1),
        (RunSettings(data_parallel_shard="zero2", deterministic=True, tensor_slices=8), CONFIG, ranks_of(4), 1),
        # In 8 parts `model.norm.weight` would have other bits: two groups of 4.
        (RunSettings(data_parallel_shard="zero2", deterministic=True, tensor_slices=8), CONFIG, ranks_of(8), 2),
        # A vocabulary that tp 3 cuts unevenly cannot be cut again.
        (RunSettings(data_parallel_shard="zero3"), dataclasses.replace(CONFIG, vocab_size=500), ranks_of(2, 3), 2),
    ],
)
def test_an_audit_takes_the_fewest_replicas_that_work(
    settings: RunSettings, config: ModelConfig, ranks: Any, replicas: int
) -> None:
    assert fewest_replicas(settings, config, ranks) == replicas


def limits_of_groups(tp: int, replicas: int, seconds: float) -> list[float]:
    layout = init_parallel(tp, CPU, timeout=seconds).sharded(replicas)
    assert layout.shard_mesh is not None
    groups = {*layout.mesh.get_all_groups(), *layout.shard_mesh.get_all_groups()} - {dist.group.WORLD}
    return [group._get_backend(CPU).options._timeout.total_seconds() for group in groups]


@pytest.mark.parametrize(("tp", "replicas", "groups"), [(2, 1, 2), (1, 2, 3)])
def test_every_group_of_the_mesh_waits_as_long_as_was_asked_for(
    rank_pool: RankPool, tp: int, replicas: int, groups: int
) -> None:
    """Gloo a minute longer than the watchdog, which says more."""
    for found in rank_pool.run(4, limits_of_groups, tp, replicas, 100.0):
        assert found == [160.0] * groups
