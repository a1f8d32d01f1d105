"""`plan_run.py`: its arithmetic by hand, what it refuses, and a run started with the file it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml

import forked_commands
import plan_run
from colonnade.config import complete_settings, load_preset, preset_names
from colonnade.errors import UsageError
from colonnade.flags import parse_training
from colonnade.parallel.determinism import check_micro_batches
from colonnade.parallel.sharding import check_slices, default_slices
from colonnade.tuning.plan import recommended_step, warmup_of
from distributed.launching import MODEL, losses, make_inputs
from plans import LARGE, planned
from run.inputs import named_model


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("slices", [None, 1, 2])
@pytest.mark.parametrize("gpus", [4, 8])
def test_a_deterministic_plan_is_one_that_a_run_takes(
    slices: int | None, gpus: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--gpus", str(gpus), "--gpu", "H100", "--deterministic", "--tokens-per-step", str(96 * 4096), "--no-write"]
    if slices is not None:
        flags += ["--tensor-slices", str(slices)]
    plan = planned(capsys, *LARGE, *flags)
    config = named_model(complete_settings({"preset": "argonne-2b"}), 151669)
    check_slices(config, plan["parallel"]["tp"], slices or default_slices(config))
    check_micro_batches(96, plan["micro_batch"], plan["dp"])


def test_the_numbers_of_a_plan_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *LARGE, "--gpus", "16", "--gpu", "H100", "--tokens-per-step", str(2**20))
    # 20 layers of hidden size 3072 with 24 heads of 128 over 4 key/value heads, feed-forward 8192.
    layer = 3072 * (2 * 3072 + 2 * 512) + 3 * 3072 * 8192 + 2 * 3072
    inside, table = 20 * layer + 3072, 151669 * 3072
    assert plan["parameters_without_embeddings"] == inside
    assert plan["parameters"] == inside + 2 * table
    steps = math.ceil(22 * (inside + 2 * table) / 2**20)
    assert (plan["steps"], plan["tokens"], plan["warmup_steps"]) == (steps, steps * 2**20, steps // 100)
    assert plan["flops"] == plan["tokens"] * (6 * (inside + table) + 12 * 20 * 3072 * 4096)
    of_step = plan["step_time"]
    assert plan["seconds"] == pytest.approx(steps * of_step["seconds"])
    assert of_step["seconds"] == pytest.approx(of_step["compute"] + of_step["communication"] - of_step["hidden"])
    assert plan["parallel"]["activation_checkpointing"] == "none"  # else the FLOPs are more
    assert of_step["compute"] * steps == pytest.approx(plan["flops"] / (16 * 0.4 * 989.4e12))
    assert plan["micro_batch"] * plan["accumulation"] * plan["dp"] * 4096 == 2**20
    assert plan["parallel"]["tp"] * plan["dp"] == 16
    assert plan["memory"]["total"] <= plan["memory_limit"] == pytest.approx(0.9 * 79.1 * 2**30, abs=2)
    # The next larger micro-batch would not have fitted.
    larger = [
        "--micro-batch-size",
        str(2 * plan["micro_batch"]),
    ]
    for name in ("tensor_parallel_size", "activation_checkpointing", "data_parallel_shard"):
        larger += [f"--{name.replace('_', '-')}", str(plan["recommended"][name])]
    common = (*LARGE, "--gpus", "16", "--gpu", "H100", "--tokens-per-step", str(2**20), "--no-write")
    with pytest.raises(UsageError, match="a rank would need"):
        plan_run.main([*common, *larger])


def test_the_file_holds_the_switches_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """A slow network and a fixed tp: replicas in the nodes, and the sums of layers behind computation."""
    rates = ("--network", "1.5", "--interconnect", "50", "--tokens-per-step", str(2**19), "--tensor-parallel-size", "4")
    fixed = ("--data-parallel-shard", "zero3", "--sequence-parallel")
    plan_run.main([*LARGE, "--gpus", "16", "--gpu", "H100", *rates, *fixed, "--activation-checkpointing", "none"])
    printed = capsys.readouterr().out
    assert "data-parallel shard zero3, 2 replicas, sequence parallel, overlap\n" in printed
    settings = complete_settings(parse_training(["--config", "run.yaml"]))
    assert settings.data_parallel_replicate_size == 2
    assert settings.sequence_parallel
    assert settings.overlap_collectives
    # Without a fixed kind of sharding there are rows for each, and one row for each.
    plan_run.main([*LARGE, "--gpus", "16", "--gpu", "H100", *rates, "--no-write"])
    printed = capsys.readouterr().out
    rows = printed[printed.index("candidates ") : printed.index("assumed")].splitlines()[2:]
    assert len({tuple(row.split()[:4]) for row in rows}) == len(rows) == 6


def test_what_is_fixed_stays(capsys: pytest.CaptureFixture[str]) -> None:
    switches = ("--no-sequence-parallel", "--no-overlap-collectives")
    kinds = ("--activation-checkpointing", "full", "--data-parallel-shard", "none")
    fixed = (*switches, *kinds, "--tensor-parallel-size", "4")
    plan = planned(capsys, *LARGE, "--gpus", "8", "--gpu", "L4", *fixed, "--output", "a.yaml")
    (candidate,) = plan["candidates"]
    assert candidate["parallel"]["activation_checkpointing"] == "full"
    assert plan["memory"]["total"] <= 19 * 2**30  # 22 less 3
    written = yaml.safe_load(Path("a.yaml").read_text())
    names = ("activation_checkpointing", "data_parallel_shard", "tensor_parallel_size")
    assert [written[name] for name in names] == ["full", "none", 4]
    with pytest.raises(UsageError, match=r"at tp 1, and may use 19\.0 of L4; give more --gpus"):
        plan_run.main([*LARGE, "--gpus", "8", "--gpu", "L4", *fixed[:-1], "1", "--no-write"])


def test_muon_shares_out_its_matrices_too(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *LARGE, "--optimizer", "muon", "--gpu", "H100", "--gpus", "8", "--no-write")
    modes = {one["parallel"]["data_parallel_shard"] for one in plan["candidates"]}
    assert modes == {"none", "zero2", "zero3"}
    asked = (*LARGE, "--optimizer", "muon", "--data-parallel-shard", "zero2", "--gpus", "8")
    plan = planned(capsys, *asked, "--tensor-parallel-size", "1", "--no-write")
    assert [one["what"] for one in plan["traffic"] if "Muon" in one["what"]] == ["Muon: rows of matrices"]


def test_float8_leaves_out_sizes_that_it_cannot_take(capsys: pytest.CaptureFixture[str]) -> None:
    # 8 heads of 16 and a feed-forward of 352 channels: of 8 slices it has 44.
    common = ("--preset", "tiny", "--vocab-size", "4096", "--gpus", "8", "--gpu", "H200", "--float8", "--no-write")
    plan = planned(capsys, *common)
    assert {one["parallel"]["tp"] for one in plan["candidates"]} == {1, 2}
    assert "float8: neither the time nor the memory it saves is counted" in plan["assumptions"]
    with pytest.raises(UsageError, match=r"with 8 slices the feed-forward is 44, no multiple of 16; .*--tensor-paral"):
        plan_run.main([*common, "--tensor-parallel-size", "8"])


def test_a_plan_tells_what_its_ranks_leave_idle(capsys: pytest.CaptureFixture[str]) -> None:
    common = (*LARGE, "--gpus", "1", "--gpu", "H200", "--no-write", "--tokens-per-step", "4096", "--tokens", "5000")
    plan = planned(capsys, *common, "--data-parallel-shard", "zero3", "--sequence-parallel", "--overlap-collectives")
    told = "\n".join(plan["assumptions"])
    for line in (
        "zero3 has nothing to share out: at tp 1 x dp 1",
        "--sequence-parallel changes nothing",
        "--overlap-collectives changes nothing",
        "tokens: 5,000, rounded up to whole steps",
    ):
        assert line in told
    assert plan["tokens"] == 8192


def test_switches_that_compute_gradients_of_weights_with_the_others_hide_less(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fixed = ("--tensor-parallel-size", "8", "--no-overlap-collectives", "--no-sequence-parallel")
    common = (*LARGE, "--gpus", "8", "--gpu", "H100", *fixed, "--no-write")
    hidden = planned(capsys, *common)["step_time"]["hidden"]
    assert hidden > 0
    for switch in ("--plain-step", "--float8", "--cuda-graphs", "--deterministic"):
        assert planned(capsys, *common, switch)["step_time"]["hidden"] == 0, switch
    assert planned(capsys, *common, "--deterministic", "--disable-compile")["step_time"]["hidden"] == hidden


def test_gradients_that_are_summed_after_the_backward_pass_hide_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    common = (*LARGE, "--gpus", "2", "--gpu", "H200", "--tensor-parallel-size", "1", "--data-parallel-shard", "none")
    assert planned(capsys, *common, "--no-write")["step_time"]["hidden"] > 0
    for switch in ("--plain-step", "--deterministic"):
        assert planned(capsys, *common, "--no-write", switch)["step_time"]["hidden"] == 0, switch


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (7, 3), (500, 10), (5000, 50), (10**6, 2000)])
def test_the_warm_up_follows_from_the_steps(steps: int, warmup: int) -> None:
    assert warmup_of(steps) == warmup


def test_the_recommended_step_grows_with_compute() -> None:
    # 20 x 0.3271 = 6.542, and 10^6.542 = 3.483 million; 0.292 of that.
    assert recommended_step(1e20) == pytest.approx(1.017e6, rel=1e-3)


def test_length_and_batch_of_a_file_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--preset", "tiny", "--vocab-size", "4096", "--gpus", "8", "--gpu", "H200", "--config", "mine.yaml")
    Path("mine.yaml").write_text("total_steps: 5000\ninitial_batch_size: 4\ntokens_per_step: 32768\n")
    plan_run.main([*common, "--output", "a.yaml"])
    written = yaml.safe_load(Path("a.yaml").read_text())
    assert (written["total_steps"], written["initial_batch_size"]) == (5000, "4")
    assert "163,840,000" in capsys.readouterr().out  # 5000 x 32768 tokens
    # Flags come first.
    plan = planned(capsys, *common, "--tokens", str(300 * 32768), "--micro-batch-size", "2", "--no-write")
    assert (plan["steps"], plan["micro_batch"]) == (300, 2)
    assert planned(capsys, *common, "--total-steps", "7", "--no-write")["steps"] == 7
    Path("mine.yaml").write_text("initial_batch_size: auto\n")
    assert planned(capsys, *common, "--no-write")["micro_batch"] >= 1
    Path("mine.yaml").write_text("gradient_accumulation_steps: 6\n")
    with pytest.raises(UsageError, match=r"gradient_accumulation_steps 6: .* give --tokens-per-step"):
        plan_run.main([*common, "--no-write"])


@pytest.mark.parametrize("steps", [100, 20_000])
def test_the_recommended_step_goes_with_the_steps(steps: int, capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, *LARGE, "--gpus", "1", "--gpu", "H200", "--total-steps", str(steps), "--no-write")
    assert (plan["steps"], plan["tokens"]) == (steps, steps * plan["tokens_per_step"])
    flops = plan["flops"] - plan["tokens"] * 6 * 151669 * 3072
    wanted = 0.292 * flops**0.3271  # rounded to a power of two: at most the root of two away from it
    assert 2**-0.5 <= plan["tokens_per_step"] / wanted <= 2**0.5


def test_without_a_device_a_plan_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    plan_run.main([*LARGE, "--gpus", "8", "--no-write"])
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("no --gpu")]
    assert said == ["no --gpu: fp32 and no time known; name the GPU for a recommendation"]
    plan_run.main([*LARGE, "--gpus", "8", "--gpu", "H200", "--no-write"])
    assert "no --gpu" not in capsys.readouterr().out


@pytest.mark.parametrize("name", preset_names())
def test_the_file_is_one_that_training_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    has_vocabulary = "vocab_size" in load_preset(name)[0]
    vocabulary = () if has_vocabulary else ("--vocab-size", "4096")
    flags = ("--preset", name, *vocabulary, "--gpus", "4", "--tokens", "100000000")
    plan_run.main([*flags, "--learning-rate", "1e-3", "--optimizer", "muon", "--output", "a.yaml"])
    missing = "--data-glob 'FOLDER/*.parquet' --tokenizer-path TOKENIZER"
    assert f"torchrun --nproc_per_node=4 training.py --config a.yaml {missing}\n" in capsys.readouterr().out
    assert missing in Path("a.yaml").read_text().splitlines()[1]
    written = yaml.safe_load(Path("a.yaml").read_text())
    taken = parse_training(["--config", "a.yaml"])
    assert taken == written
    settings = complete_settings(taken)
    assert (settings.preset, settings.learning_rate, settings.optimizer) == (name, 1e-3, "muon")
    assert settings.total_steps * (settings.tokens_per_step or 0) >= 100_000_000


def test_a_run_starts_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(forked_commands.ROOT)
    file = str(tmp_path / "plan.yaml")
    data, glob, tokenizer, path, config_flag, config, *_ = make_inputs(tmp_path)
    assert (data, tokenizer, config_flag) == ("--data-glob", "--tokenizer-path", "--model-config")
    flags = (data, glob, tokenizer, path, config_flag, config, "--block-size", "64", "--log-interval", "1")
    sizes = ("--tokens", "1000", "--tokens-per-step", "512", "--micro-batch-size", "4", "--gpus", "2")
    plan = planned(capsys, *flags, *sizes, "--checkpoint-dir", str(tmp_path / "run"), "--output", file)
    assert Path(file).read_text().splitlines()[1].endswith(f" training.py --config {file}")  # nothing is missing
    assert (plan["steps"], plan["parallel"]["tp"], plan["dp"], plan["accumulation"]) == (2, 1, 2, 1)
    outcomes = forked_commands.start("training", ["--config", file], ranks=2)
    assert {outcome.code for outcome in outcomes} == {0}, outcomes
    assert list(losses(tmp_path / "run")) == [1, 2]
    assert "tp 1 x dp 2" in outcomes[0].output
    assert "8 sequences of 64 tokens a step: micro-batch 4 x accumulation 1 x dp 2" in outcomes[0].output
    assert f"{plan['parameters']:,} parameters ({plan['parameters_without_embeddings']:,} with" in outcomes[0].output


def test_the_table_of_parameters_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    answer = planned(capsys, *LARGE, "--count-parameters")
    assert sum(row["parameters"] for row in answer["modules"]) == answer["parameters"]
    assert sum(row["share"] for row in answer["modules"]) == pytest.approx(1)
    plan_run.main([*LARGE, "--count-parameters"])
    lines = capsys.readouterr().out.splitlines()
    query = ["model.layers.*.self_attn.q_proj.weight", "3072", "x", "3072", "20", "188,743,680", "6.5%"]
    assert lines[2].split() == query
    assert lines[-3].split()[:2] == ["all", f"{answer['parameters']:,}"]
    assert lines[-2].split()[-2] == f"{answer['parameters_without_embeddings']:,}"
    assert not Path("run.yaml").exists()


def test_tensor_sizes_that_leave_no_replicas_are_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--gpus", "8", "--gpu", "H200", "--data-parallel-shard", "zero2", "--data-parallel-replicate-size", "4")
    plan = planned(capsys, *LARGE, *asked, "--no-write")
    assert {candidate["parallel"]["dp"] for candidate in plan["candidates"]} == {4, 8}


def test_the_link_of_an_unknown_device_is_called_an_assumption(capsys: pytest.CaptureFixture[str]) -> None:
    told = ("--gpus", "8", "--gpu", "H1000", "--gpu-memory-gib", "141", "--gpu-tflops", "989.4", "--no-write")
    said = "communication: the link of H1000 is not known, pcie4 is assumed; give --interconnect"
    assert said in planned(capsys, *LARGE, *told)["assumptions"]
    assert said not in planned(capsys, *LARGE, *told, "--interconnect", "nvlink4")["assumptions"]


def test_a_device_may_be_told_instead_of_known(capsys: pytest.CaptureFixture[str]) -> None:
    plans = []
    told = ("--gpu-memory-gib", "139.8", "--gpu-tflops", "989.4", "--interconnect", "nvlink4")
    for device in (("--gpu", "H200"), ("--gpu", "H1000", *told)):
        plan = planned(capsys, *LARGE, "--gpus", "8", *device, "--no-write")
        plans.append({name: value for name, value in plan.items() if name not in ("gpu", "assumptions")})
    assert plans[0]["step_time"] is not None
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--gpus", "8"), "--preset or --model-config is missing"),
        (("--preset", "tiny"), "takes its vocabulary from the tokenizer: give --tokenizer-path or --vocab-size"),
        ((*LARGE, "--tokenizer-path", "x"), "--vocab-size 151669 and --tokenizer-path x: give one of them"),
        (
            (*LARGE, "--tokens", "5", "--tokens-per-parameter", "3"),
            "--tokens 5 and --tokens-per-parameter 3.0: give",
        ),
        (
            (*LARGE, "--gpu", "H1000"),
            "--gpu 'H1000': its memory is not known; give --gpu-memory-gib, or a name such as H200",
        ),
        ((*LARGE, "--gpu", "V100-SXM2", "--precision", "bf16"), "V100-SXM2 only emulates its products; give fp16"),
        ((*LARGE, "--gpu-tflops", "100"), "--gpu-tflops 100 is of no device: name it with --gpu, or leave it out"),
        (
            (*LARGE, "--gpu", "H1000", "--gpu-memory-gib", "8"),
            "moments alone take 43.0 GiB .* and may use 5.0 of H1000; give more --gpus",
        ),
        ((*LARGE, "--gpu", "L4"), "moments alone take 43.0 GiB .* and may use 19.0 of L4; give more --gpus"),
        ((*LARGE, "--tokens-per-step", "4097"), "4097 is no multiple of --block-size 4096; nearest: 4096 or 8192"),
        (
            (*LARGE, "--float8", "--gpu", "V100-SXM2-32GB"),
            "--float8 needs an NVIDIA GPU from Hopper on, and --gpu V100",
        ),
        ((*LARGE, "--float8", "--gpu", "A100 80GB"), "--float8 needs an NVIDIA GPU from Hopper on, and --gpu A100"),
        ((*LARGE, "--float8", "--gpu", "H200", "--precision", "fp32"), "--float8 and --precision fp32: .*use --prec"),
        ((*LARGE, "--float8", "--gpu", "H200", "--block-size", "1001"), "--block-size 1001 is no mul.*use 992 or 1008"),
        ((*LARGE, "--network", "-3"), "--network '-3' is no link that is known; give one of .* as a number above 0"),
        ((*LARGE, "--tokens-per-step", "4096", "--gpus", "2"), None),  # at tp 2
        (
            (*LARGE, "--tokens-per-step", "12288", "--gpus", "2", "--tensor-parallel-size", "1"),
            "12288 tokens of a step are 3 sequences, which 2 devices .* at tp 1; .* multiple of 8192, or --gpus 1, 3",
        ),
        ((*LARGE, "--deterministic", "--tensor-slices", "3"), "--tensor-slices 3 is not a power of two"),
        (
            (*LARGE, "--deterministic", "--tensor-slices", "2", "--tensor-parallel-size", "4", "--gpus", "4"),
            "--tensor-slices 2 cannot be shared out over 4 tensor-parallel ranks",
        ),
        (
            (*LARGE, "--deterministic", "--tokens-per-step", str(12 * 4096), "--gpus", "6"),
            "the 12 sequences of a step can be halved for 1, 2, 4 .*, and --gpus 6 at tp 1, 2 are other numbers",
        ),
        ((*LARGE, "--tensor-parallel-size", "3", "--gpus", "8"), "3 does not divide --gpus 8; .*: 1, 2, 4, 8"),
        ((*LARGE, "--tensor-parallel-size", "16", "--gpus", "16"), "24 attention heads cannot be cut into 16"),
        (
            (*LARGE, "--gpus", "4", "--data-parallel-shard", "zero2", "--data-parallel-replicate-size", "3"),
            "3 does not divide the 4 data-parallel ranks; sizes that do: 1, 2, 4",
        ),
        ((*LARGE, "--micro-batch-size", "3"), "--micro-batch-size 3 does not divide the .* near it do: 2, 4, 1"),
        ((*LARGE, "--block-size", "8192"), "--block-size 8192 is above the model's context of 4096"),
        ((*LARGE, "--network", "slow"), "--network 'slow' is no link that is known; give one of nvlink3, "),
        ((*LARGE, "--gpus", "12"), "--gpus 12 are no whole nodes of 8; give a multiple of it, or --gpus-per-node"),
        ((*LARGE, "--utilisation", "1.5"), "--utilisation is 1.5; it must be at most 1.0"),
        ((*LARGE, "--total-steps", "5", "--tokens", "9"), "--tokens 9 and --total-steps 5: give one of them"),
        ((*LARGE, "--total-steps", "0"), "--total-steps is 0; it must be at least 1"),
        ((*LARGE, "--initial-batch-size", "5"), "unknown flag --initial-batch-size"),
    ],
)
def test_what_cannot_be_planned_is_one_line(flags: tuple[str, ...], says: str | None) -> None:
    if says is None:
        plan_run.main([*flags])
        return
    with pytest.raises(UsageError, match=says) as refusal:
        plan_run.main([*flags])
    assert "\n" not in str(refusal.value)
    assert not Path("run.yaml").exists()


def test_a_config_says_its_own_vocabulary(capsys: pytest.CaptureFixture[str]) -> None:
    Path("config.json").write_text(json.dumps({**MODEL, "vocab_size": 300}))
    assert planned(capsys, "--model-config", "config.json", "--no-write")["vocab_size"] == 300
    with pytest.raises(UsageError, match="--vocab-size 301: the model's config says 300; leave it out"):
        plan_run.main(["--model-config", "config.json", "--vocab-size", "301"])


def test_a_file_is_not_replaced_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text("mine")
    tiny = ("--preset", "tiny", "--vocab-size", "500")
    with pytest.raises(UsageError, match=r"run\.yaml is there already: give another name, --force, or --no-write"):
        plan_run.main([*tiny])
    assert planned(capsys, *tiny, "--no-write")["output"] is None
    assert Path("run.yaml").read_text() == "mine"
    plan_run.main([*tiny, "--force"])
    assert yaml.safe_load(Path("run.yaml").read_text())["preset"] == "tiny"
    with pytest.raises(UsageError, match="cannot be written"):
        plan_run.main([*tiny, "--output", "nowhere/run.yaml"])


@pytest.mark.parametrize(("name", "entries"), [("ernie-0.3b", 103_424), ("llama3-8b", 128_256)])
def test_a_preset_with_a_vocabulary_of_its_own_needs_no_other(
    name: str, entries: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned(capsys, "--preset", name, "--count-parameters")["vocab_size"] == entries
    assert planned(capsys, "--preset", name, "--gpus", "8", "--gpu", "H200", "--no-write")["vocab_size"] == entries
