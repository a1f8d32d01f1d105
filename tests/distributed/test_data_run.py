"""The data plane in real runs: lanes shared out, mixtures, packing and masks, and data that changes or is damaged."""

import json
import shutil

import pytest

import forked_commands
from data_helpers import flip_bit, stdlib_texts, write_corpus, write_shard
from distributed.launching import losses, make_inputs, position, run

STEPS = 12


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Two corpora of many small row groups; all that a stream can be told."""
    folder = tmp_path_factory.mktemp("inputs")
    common = make_inputs(folder)
    write_corpus(folder / "prose", stdlib_texts(40), group=4)
    write_corpus(folder / "code", stdlib_texts(60)[40:], group=4)
    mixture = f"prose={folder}/prose/*.parquet:3,code={folder}/code/*.parquet:1"
    return [
        *(mixture if before == "--data-glob" else flag for before, flag in zip(["", *common], common, strict=False)),
        *("--total-steps", str(STEPS), "--checkpoint-interval", "4", "--initial-batch-size", "4"),
        *("--gradient-accumulation-steps", "2", "--data-lanes", "4", "--packing", "best-fit", "--document-mask"),
        *("--add-document-boundary-tokens", "--tokenizer-backend", "hf"),
    ]


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """The whole run on one rank."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    run("training.py", [*flags, "--checkpoint-dir", str(directory)])
    return directory


def go_on_from(uninterrupted, directory, step):
    shutil.copytree(uninterrupted, directory)
    for later in range(step + 4, STEPS + 1, 4):
        shutil.rmtree(directory / f"streaming_checkpoint_step_{later}")
    return ["--checkpoint-dir", str(directory)]


@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (4, 2)], ids=["dp 2", "tp 2 x dp 2"])
def test_lanes_are_shared_out_and_the_run_is_the_same(flags, uninterrupted, tmp_path, ranks, tp):
    """Gone on with at another number of readers: the same losses, positions and ledger."""
    directory = tmp_path / "run"
    more = go_on_from(uninterrupted, directory, 4)
    batch = ["--gradient-accumulation-steps", str(2 * tp // ranks)]
    output = run("training.py", [*flags, *batch, *more, "--tensor-parallel-size", str(tp)], ranks=ranks)
    assert "prose 3 files (75.0%), code 3 files (25.0%); 4 lanes, shuffled, best-fit" in output
    expected, actual = losses(uninterrupted), losses(directory)
    assert {step: pytest.approx(loss, rel=1e-5) for step, loss in expected.items()} == actual
    for step in (8, 12):
        assert position(directory, step) == position(uninterrupted, step)
    ledgers = [json.loads((folder / "data_ledger.json").read_text()) for folder in (directory, uninterrupted)]
    assert ledgers[0] == ledgers[1]
    assert ledgers[0]["chunks"] == STEPS * 8
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    shares = {name: rows[-1][f"data_share/{name}"] for name in ("prose", "code")}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["prose"] == pytest.approx(ledgers[0]["corpora"]["prose"]["share"])
    assert 0.65 < shares["prose"] < 0.85
    assert rows[-1]["data_padding_fraction"] > 0


def test_weights_change_with_the_resume_command_only(flags, uninterrupted, tmp_path):
    directory = tmp_path / "run"
    more = go_on_from(uninterrupted, directory, 4)
    pattern = flags[flags.index("--data-glob") + 1]
    equal = pattern.replace(":3,", ":1,")
    changed = [equal if flag == pattern else flag for flag in flags]
    refused = run("training.py", [*changed, *more], code=2)
    assert "weights of prose, code 0.75, 0.25 -> 0.5, 0.5" in refused
    output = run("resume_pretrain_tensor.py", ["--checkpoint-path", str(directory), "--data-glob", equal])
    assert "weights of the corpora from chunk 32 on" in output
    assert [chunk for chunk, _ in position(directory, STEPS)["schedule"]] == [0, 32]


def test_changed_data_needs_leave_and_is_recorded(flags, uninterrupted, tmp_path):
    directory, corpus = tmp_path / "run", tmp_path / "code"
    go_on_from(uninterrupted, directory, 8)
    pattern = flags[flags.index("--data-glob") + 1]
    old = pattern.partition("code=")[2].partition("/*.parquet")[0]
    shutil.copytree(old, corpus)
    write_shard(corpus / "part_9.parquet", stdlib_texts(20), group=4)
    given = ["--checkpoint-path", str(directory), "--data-glob", pattern.replace(old, str(corpus)), "--keep-optimizer"]
    refused = run("resume_pretrain_tensor.py", given, code=2)
    assert "corpus code 3 files with 20 rows" in refused
    assert "part_9.parquet" in refused
    output = run("resume_pretrain_tensor.py", [*given, "--allow-data-change"])
    (report,) = (line for line in output.splitlines() if line.startswith("changed since the checkpoint: "))
    assert "; corpus code 3 files with 20 rows" in report
    assert "part_9.parquet" in report
    changes = json.loads((directory / "data_ledger.json").read_text())["changes"]
    assert [change["at_chunk"] for change in changes] == [64]
    assert position(directory, STEPS)["chunk"] == STEPS * 8


def test_a_reader_that_fails_ends_all_ranks_and_names_the_file(tmp_path):
    """Two readers; the second one comes upon a damaged row group that it may not skip."""
    common = make_inputs(tmp_path)
    corpus = tmp_path / "corpus"
    shutil.rmtree(corpus)
    texts = [f"{text} (document {index})" for index, text in enumerate(stdlib_texts())]
    plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    for index in range(4):
        write_shard(corpus / f"part_{index}.parquet", texts[index * 15 : index * 15 + 15], group=1, **plain)
    flip_bit(corpus / "part_3.parquet", b"(document 59)")
    flags = [*common, "--tensor-parallel-size", "1", "--data-lanes", "2", "--no-shuffle", "--strict-data"]
    flags += ["--initial-batch-size", "1", "--checkpoint-dir", str(tmp_path / "run"), "--tokenizer-backend", "hf"]
    outcomes = forked_commands.start("training", [*flags, "--total-steps", "4000"], ranks=2)
    assert [outcome.code for outcome in outcomes] == [1, 1], outcomes
    assert "part_3.parquet is damaged" in outcomes[1].errors
    assert max(losses(tmp_path / "run")) > 1
