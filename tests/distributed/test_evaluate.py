"""`evaluate.py` against `transformers` with the same weights, a strided loop by hand, and bytes counted by hand."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

import evaluate
from colonnade.command_settings import TrainedModelSettings
from colonnade.data.held_out import Piece, Tally, batches_of, cut_windows, encoded, limited, texts_of
from colonnade.data.shards import open_shards
from colonnade.data.tokenization import Encoder, boundary_tokens, load_tokenizer, puts_before
from colonnade.errors import RunError, UsageError
from colonnade.flags import parse_evaluation
from colonnade.parallel.mesh import init_parallel
from data_helpers import stdlib_texts, tiny_tokenizer
from distributed.launching import make_inputs
from forked_commands import start
from run.evaluation import corpora_of
from run.trained_model import open_trained

ROWS = ["def f(x):\n    return x\n", "", "12345 67890", None, "naïve café ☕ " * 30, "x", *stdlib_texts(6)]


def write_rows(path, rows):
    pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs trained for two steps with and without boundary tokens, and rows to score."""
    folder = tmp_path_factory.mktemp("evaluate")
    flags = [*make_inputs(folder), "--initial-batch-size", "4", "--total-steps", "2", "--learning-rate", "1e-2"]
    write_rows(folder / "held_out.parquet", ROWS)
    for name, more in (("plain", []), ("boundaries", ["--add-document-boundary-tokens"])):
        (outcome,) = start("training", [*flags, *more, "--checkpoint-dir", str(folder / name)])
        assert outcome.code == 0, outcome.errors
    return folder


@pytest.fixture(scope="module")
def twin(folder, single_rank):
    """`transformers`' own Llama with the weights of a run."""
    layout = init_parallel(1, torch.device("cpu"))

    def build(name):
        model = open_trained(TrainedModelSettings(str(folder / name))).load(layout)
        twin = LlamaForCausalLM(LlamaConfig(**model.config.to_dict(), attn_implementation="eager"))
        twin.load_state_dict(dict(model.full_parameters()), strict=False)
        return twin.eval()

    return build


@torch.no_grad()
def strided(model, documents, block, stride):
    """Nats and tokens by the loop of the Hugging Face guide on perplexity, with one target more a window than there."""
    nats, count = 0.0, 0
    for ids in documents:
        scored = 0  # the last position that has been predicted
        for begin in range(0, len(ids), stride):
            end = min(begin + block, len(ids) - 1)
            if end <= scored:
                break
            logits = model(torch.tensor([ids[begin:end]])).logits[0].double()
            losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[begin + 1 : end + 1]), reduction="none")
            fresh = end - scored
            nats, count, scored = nats + float(losses[-fresh:].sum()), count + fresh, end
    return nats, count


def result(folder, tmp_path, *flags, run="plain", ranks=1):
    report = tmp_path / "scores.json"
    given = ["--checkpoint-path", str(folder / run), "--json", str(report), *flags]
    outcomes = start("evaluate", given, ranks=ranks)
    assert [outcome.code for outcome in outcomes] == [0] * ranks, outcomes[0].errors
    return json.loads(report.read_text())["data"]


def test_rows_equal_a_strided_loop_over_transformers(folder, twin, tmp_path):
    flags = ["--data-glob", str(folder / "held_out.parquet"), "--stride", "24"]
    (score,) = result(folder, tmp_path, *flags)
    texts = [row for row in ROWS if row]
    encoder = Encoder(load_tokenizer(str(folder / "tokenizer")))
    documents = encoder(texts)
    nats, count = strided(twin("plain"), documents, 64, 24)
    assert score["tokens"] == count == sum(len(ids) - 1 for ids in documents)
    assert score["loss"] == pytest.approx(nats / count, rel=1e-6)
    assert score["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-5)
    # Nothing precedes a first token. Here each is of whole characters, which the tokenizer gives back.
    tokenizer = tiny_tokenizer()
    firsts = [tokenizer.decode(ids[:1]) for ids in documents]
    assert all(text.startswith(first) for text, first in zip(texts, firsts, strict=True))
    size = sum(len(text.encode()) - len(first.encode()) for text, first in zip(texts, firsts, strict=True))
    assert score["bytes"] == size
    assert score["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    assert (score["documents"], score["left_out"]) == (len(texts), {"empty": 1, "missing": 1})


def test_a_prefix_is_predicted_from_and_not_scored(folder, twin, tmp_path):
    (score,) = result(folder, tmp_path, "--data-glob", str(folder / "held_out.parquet"), run="boundaries")
    texts = [row for row in ROWS if row]
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    begin, end = boundary_tokens(tokenizer)
    documents = [[end if begin is None else begin, *ids] for ids in Encoder(tokenizer)(texts)]
    nats, count = strided(twin("boundaries"), documents, 64, 32)
    assert score["loss"] == pytest.approx(nats / count, rel=1e-6)
    assert score["bytes"] == sum(len(text.encode()) for text in texts)


def test_every_number_of_ranks_gives_the_same(folder, tmp_path):
    flags = ["--data-glob", str(folder / "held_out.parquet"), "--batch-size", "3"]
    (alone,) = result(folder, tmp_path, *flags)
    (cut,) = result(folder, tmp_path, *flags, ranks=2)
    (shared,) = result(folder, tmp_path, *flags, "--tensor-parallel-size", "1", ranks=2)
    exact = ("tokens", "bytes", "documents", "left_out")
    assert {name: alone[name] for name in exact} == {name: cut[name] for name in exact}
    assert cut["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert {**shared, "seconds": 0} == {**alone, "seconds": 0}


LINES = [" = Title = \n", "", " First paragraph .\n", " Second one , café .\n", ""]
JOINED = " = Title = \n\n First paragraph .\n Second one , café .\n\n"


def test_lines_of_a_file_are_one_document(folder, twin, tmp_path):
    write_rows(tmp_path / "lines.parquet", LINES)
    (tmp_path / "lines.txt").write_text(JOINED)
    flags = ["--data-glob", f"rows={tmp_path}/lines.parquet,file={tmp_path}/lines.txt", "--document-prefix", "token"]
    rows, file = result(folder, tmp_path, *flags, "--concatenate", "--block-size", "16", "--stride", "16")
    assert (rows["name"], file["name"]) == ("rows", "file")
    assert {**rows, "name": "file", "seconds": 0} == {**file, "seconds": 0}
    assert rows["bytes"] == len(JOINED.encode())
    assert rows["documents"] == 1
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    begin, end = boundary_tokens(tokenizer)
    document = [end if begin is None else begin, *Encoder(tokenizer)([JOINED])[0]]
    nats, count = strided(twin("plain"), [document], 16, 16)
    assert (rows["tokens"], rows["loss"]) == (count, pytest.approx(nats / count, rel=1e-6))


def test_a_uniform_model_has_the_bits_of_its_vocabulary(folder, single_rank, tmp_path):
    """Weights of a `.pth` file whose head is 0: log2 of the vocabulary a token, exactly."""
    model = open_trained(TrainedModelSettings(str(folder / "plain"))).load(init_parallel(1, torch.device("cpu")))
    weights = dict(model.full_parameters())
    weights["lm_head.weight"] = torch.zeros_like(weights["lm_head.weight"])
    torch.save({"model_state_dict": weights}, tmp_path / "zero.pth")
    report = tmp_path / "scores.json"
    evaluate.main(
        [
            *("--checkpoint-path", str(tmp_path / "zero.pth"), "--model-config", str(folder / "config.json")),
            *("--tokenizer-path", str(folder / "tokenizer"), "--data-glob", str(folder / "held_out.parquet")),
            *("--json", str(report), "--precision", "bf16", "--max-documents", "4", "--block-size", "20"),
        ]
    )
    (score,) = json.loads(report.read_text())["data"]
    bits = math.log2(model.config.vocab_size) * score["tokens"] / score["bytes"]
    assert score["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert score["documents"] == 4


def test_a_hugging_face_folder_scores_as_transformers_does(folder, twin, tmp_path, capsys):
    theirs = twin("plain")
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    tokenizer.save_pretrained(tmp_path / "theirs")
    report = tmp_path / "scores.json"
    given = ["--checkpoint-path", str(tmp_path / "theirs")]
    text = ["--data-glob", str(folder / "held_out.parquet"), "--block-size", "16", "--stride", "16"]
    evaluate.main([*given, *text, "--document-prefix", "token", "--json", str(report)])
    (score,) = json.loads(report.read_text())["data"]
    begin, end = boundary_tokens(tokenizer)
    first = end if begin is None else begin
    documents = [[first, *ids] for ids in Encoder(tokenizer)([row for row in ROWS if row])]
    nats, count = strided(theirs, documents, 16, 16)
    assert (score["tokens"], score["loss"]) == (count, pytest.approx(nats / count, rel=1e-6))
    with pytest.raises(UsageError, match="has sizes of its own: leave out --preset tiny"):
        evaluate.main([*given, *text, "--preset", "tiny"])
    assert not open_trained(TrainedModelSettings(given[1])).settings.add_document_boundary_tokens
    adding = load_tokenizer(str(folder / "tokenizer"))
    adding.bos_token = adding.convert_ids_to_tokens(0)
    rule = TemplateProcessing(single=f"{adding.bos_token} $A", special_tokens=[(adding.bos_token, 0)])
    adding.backend_tokenizer.post_processor = rule
    adding.save_pretrained(tmp_path / "adding")
    trained = open_trained(TrainedModelSettings(given[1], tokenizer_path=str(tmp_path / "adding")))
    assert trained.settings.add_document_boundary_tokens
    stray = Path(shutil.copy(tmp_path / "theirs" / "config.json", folder / "plain"))
    assert open_trained(TrainedModelSettings(str(folder / "plain"))).step == 2  # a run's folder all the same
    stray.unlink()
    (tmp_path / "theirs" / "model.safetensors.index.json").unlink()
    with pytest.raises(UsageError, match=r"holds neither model\.safetensors nor"):
        evaluate.main([*given, *text])


def pieces_of(texts, tokenizer, prefix):
    return list(encoded(iter(texts), Encoder(tokenizer), prefix, Tally()))


def test_two_tokenizers_count_the_same_bytes(folder, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = {chr(code): index for index, code in enumerate(range(0x20, 0x2700))}
    plain = Tokenizer(models.BPE(vocab={**characters, "\n": len(characters)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    write_rows(tmp_path / "rows.parquet", ROWS)
    shards = open_shards([tmp_path / "rows.parquet"], "text")
    counted, tokens = [], []
    for tokenizer in (tiny_tokenizer(), PreTrainedTokenizerFast(tokenizer_object=plain)):
        texts = list(texts_of(shards, "text", concatenate=False, tally=Tally()))
        pieces = pieces_of(texts, tokenizer, prefix=0)
        counted.append(sum(piece.scored_bytes for piece in pieces))
        tokens.append(sum(len(piece.tokens) for piece in pieces))
    assert counted == [sum(len(row.encode()) for row in ROWS if row)] * 2
    assert tokens[0] < tokens[1]


def test_each_token_is_scored_once_with_context():
    rng = np.random.default_rng(0)
    for block, stride in [(8, 8), (8, 3), (8, 1), (5, 4), (1, 1)]:
        lengths = rng.integers(1, 40, 30)
        documents = [np.arange(n, dtype=np.int32) + 100 * i for i, n in enumerate(lengths)]
        pieces = []
        for document in documents:
            parts = np.split(document, sorted(rng.integers(0, len(document) + 1, 2)))
            pieces += [Piece(part, 0, index == 2) for index, part in enumerate(parts)]
        scored = {}
        for window in cut_windows(iter(pieces), block, stride):
            assert 2 <= len(window.tokens) <= block + 1
            for place in range(window.first, len(window.tokens)):
                token = int(window.tokens[place])
                assert token not in scored
                scored[token] = place
        expected = [int(token) for document in documents for token in document[1:]]
        assert sorted(scored) == expected
        for token, context in scored.items():
            assert context >= min(token % 100, block - stride + 1)


def test_a_batch_is_of_windows_of_like_length():
    windows = cut_windows((Piece(np.arange(n, dtype=np.int32), 0, True) for n in (3, 9, 5, 2, 7)), 8, 4)
    (batches,) = batches_of(windows, 2)
    assert [wire.shape for wire, _ in batches] == [(2, 9), (2, 5), (1, 2)]
    assert batches[1][0][1].tolist() == [0, 1, 2, -1, -1]


def test_limits_end_a_document():
    pieces = [Piece(np.zeros(5, np.int32), 7, False), Piece(np.zeros(5, np.int32), 7, True)] * 2
    tally = Tally()
    taken = list(limited(iter(pieces), None, 13, tally))
    assert [piece.ends for piece in taken] == [False, True, True]
    assert (tally.documents, tally.bytes) == (2, 21)
    assert len(list(limited(iter(pieces), 1, None, Tally()))) == 2


def test_names_need_no_weight():
    parsed = corpora_of("web=a/*.parquet, code=https://host/b.jsonl,web=c.txt,old=d.txt:0.5")
    assert [(each.name, each.pattern) for each in parsed] == [
        ("web", "a/*.parquet,c.txt"),
        ("code", "https://host/b.jsonl"),
        ("old", "d.txt"),
    ]
    assert corpora_of("a.parquet,b.parquet")[0].pattern == "a.parquet,b.parquet"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-glob", "x"], "--checkpoint-path is missing"),
        (["--checkpoint-path", "run"], "--data-glob is missing"),
        (
            ["--checkpoint-path", "run", "--data-glob", "x", "--batch-size", "0"],
            "--batch-size is 0; it must be at least",
        ),
        (["--checkpoint-path", "run", "--data-glob", "x", "--config", "y"], "unknown flag --config"),
        (
            ["--checkpoint-path", "run", "--data-glob", "x", "--few-shot", "2"],
            "--few-shot does nothing without --tasks",
        ),
        (["--checkpoint-path", "run", "--tasks", "x", "--stride", "2"], "--stride does nothing without --data-glob"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        parse_evaluation(flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--block-size", "65"], "--block-size 65 is above the model's context of 64"),
        (["--stride", "65"], "--stride 65 is above the block of 64 tokens"),
        (["--text-column", "body"], "body"),
        (["--max-documents", "1", "--data-glob", "{folder}/short.parquet"], "no document has a token to score"),
        (["--data-glob", "{folder}/ids.npy"], "holds token ids: bits a byte need text"),
    ],
)
def test_what_cannot_be_scored_is_refused(folder, single_rank, flags, message):
    write_rows(folder / "short.parquet", ["x"])
    np.save(folder / "ids.npy", np.zeros(100, np.uint16))
    given = ["--checkpoint-path", str(folder / "plain"), "--data-glob", str(folder / "held_out.parquet")]
    with pytest.raises(UsageError, match=message):
        evaluate.main([*given, *(flag.format(folder=folder) for flag in flags)])


def test_weights_that_are_not_finite_are_told(folder, single_rank, tmp_path):
    model = open_trained(TrainedModelSettings(str(folder / "plain"))).load(init_parallel(1, torch.device("cpu")))
    weights = {**dict(model.full_parameters()), "model.norm.weight": torch.full((64,), math.nan)}
    torch.save({"model_state_dict": weights}, tmp_path / "nan.pth")
    given = ["--checkpoint-path", str(tmp_path / "nan.pth"), "--model-config", str(folder / "config.json")]
    given += ["--tokenizer-path", str(folder / "tokenizer"), "--data-glob", str(folder / "held_out.parquet")]
    with pytest.raises(RunError, match=r"the loss on .* is nan"):
        evaluate.main(given)


TASK = """
task: next_keyword
dataset_path: json
dataset_kwargs:
  data_files: {folder}/questions.jsonl
  cache_dir: {folder}/cache
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
QUESTIONS = [
    {"question": f"def {name}(self):\n", "choices": ["    return", " import os", f" {name}"], "answer": number % 3}
    for number, name in enumerate(["close", "open", "read", "write", "seek", "flush", "name"])
]


def test_a_task_scores_what_the_logits_say(folder, twin, tmp_path):
    """lm-eval's accuracy on the exported model, against the likeliest of the choices from transformers' logits."""
    pytest.importorskip("lm_eval")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    (tmp_path / "next_keyword.yaml").write_text(TASK.format(folder=tmp_path))
    report = tmp_path / "scores.json"
    flags = ["--checkpoint-path", str(folder / "boundaries"), "--tasks", "next_keyword", "--tasks-path", str(tmp_path)]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    (outcome,) = start("evaluate", [*flags, "--json", str(report)], environment=offline)
    assert outcome.code == 0, outcome.errors
    metrics = json.loads(report.read_text())["tasks"]["next_keyword"]

    model, encoder = twin("boundaries"), Encoder(load_tokenizer(str(folder / "tokenizer")))
    right = 0
    for question in QUESTIONS:
        likelihoods = []
        for choice in question["choices"]:
            context, whole = encoder([question["question"], question["question"] + choice])
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(context), len(whole))
            likelihoods.append(sum(float(logits[place - 1, whole[place]]) for place in places))
        right += int(np.argmax(likelihoods)) == question["answer"]
    assert metrics["acc"] == pytest.approx(right / len(QUESTIONS))
    assert 0 < right < len(QUESTIONS)


def test_a_prefix_is_added_by_tokenizers_that_add_it_alone():
    begin, end = 0, 1

    def made(template):
        tokenizer = tiny_tokenizer()
        names = [(str(tokenizer.convert_ids_to_tokens(index)), index) for index in (begin, end)]
        single = template.format(begin=names[0][0], end=names[1][0])
        tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=names)
        return tokenizer

    assert not puts_before(tiny_tokenizer(), begin)
    assert puts_before(made("{begin} $A"), begin)
    assert not puts_before(made("{begin} $A"), end)
    assert not puts_before(made("{begin} $A {end}"), begin)


@pytest.mark.slow
def test_a_task_that_does_not_exist_is_refused(tmp_path):
    pytest.importorskip("lm_eval")
    (outcome,) = start("evaluate", ["--checkpoint-path", "none", "--tasks", "no_such_task"])
    assert outcome.code == 2
    assert "there is no task 'no_such_task'" in outcome.errors
