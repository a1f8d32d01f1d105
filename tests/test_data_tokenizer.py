"""Loading tokenizers, choosing boundary tokens, and the settings of the encoding threads."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.tokenization_python import PreTrainedTokenizer

from colonnade.data.tokenization import Encoder, batch_rows_setting, workers_setting
from colonnade.errors import UsageError
from data_helpers import (
    BOS,
    EOS,
    assert_same_blocks,
    plain_blocks,
    plain_tokens,
    qwen_tokenizer_folder,
    stdlib_texts,
    tiny_tokenizer,
    trained_backend,
    write_corpus,
)
from data_processing import (
    DataPosition,
    TokenStream,
    boundary_tokens,
    load_tokenizer,
    streaming_token_generator,
    vocabulary_size,
)

# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_loads_as_auto_tokenizer_loads_it(tmp_path: Path) -> None:
    tiny_tokenizer(bos_token=BOS, eos_token=EOS).save_pretrained(tmp_path)
    ours, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert ours.all_special_ids == theirs.all_special_ids
    assert Encoder(ours).digest == Encoder(tiny_tokenizer()).digest


def test_a_missing_padding_token_falls_back_to_eos(tmp_path: Path) -> None:
    tiny_tokenizer(bos_token=BOS, eos_token=EOS).save_pretrained(tmp_path / "without")
    assert load_tokenizer(str(tmp_path / "without")).pad_token == EOS
    tiny_tokenizer(pad_token=BOS, eos_token=EOS).save_pretrained(tmp_path / "with")
    assert load_tokenizer(str(tmp_path / "with")).pad_token == BOS


def test_a_generic_tokenizer_loads_without_importing_torch(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    script = (
        "import sys, data_processing\n"
        "print([name for name in ('torch', 'transformers', 'pyarrow') if name in sys.modules])\n"
        f"data_processing.load_tokenizer({str(tmp_path)!r})\n"
        "print('torch' in sys.modules)"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "False"]


def test_what_is_not_a_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    (broken / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    for path in (empty, broken, model, file, tmp_path / "absent"):
        with pytest.raises(UsageError, match=path.name) as caught:
            load_tokenizer(str(path))
        assert "\n" not in str(caught.value)


def test_code_of_a_tokenizer_does_not_run_unasked(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\n"
        "from transformers import PreTrainedTokenizerFast\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n"
        "    pass\n"
    )
    with pytest.raises(UsageError, match=r"--trust-remote-code"):
        load_tokenizer(str(tmp_path))
    assert not (tmp_path / "ran").exists()
    assert type(load_tokenizer(str(tmp_path), trust_remote_code=True)).__name__ == "OwnTokenizer"
    assert (tmp_path / "ran").exists()


def test_the_size_of_a_vocabulary_counts_gaps_between_ids() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 7})))
    assert (vocabulary_size(tokenizer), len(tokenizer)) == (8, 2)


# --- boundary tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("special", "roles", "bos", "eos"),
    [
        (["<x>", "<y>"], {"bos_token": "<x>", "eos_token": "<y>"}, "<x>", "<y>"),
        (["<x>"], {"eos_token": "<x>"}, None, "<x>"),
        (
            ["[CLS]", "[SEP]", "[PAD]"],
            {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
            "[CLS]",
            "[SEP]",
        ),
        (["<s>", "</s>"], {}, "<s>", "</s>"),
        (["<|im_start|>", "<|im_end|>", "<|endoftext|>"], {"pad_token": "<|endoftext|>"}, None, "<|endoftext|>"),
        (["<|im_start|>", "<|im_end|>"], {}, None, "<|im_end|>"),
        (["<bos>"], {}, "<bos>", None),
    ],
)
def test_boundary_tokens_and_their_fallbacks(
    special: list[str], roles: dict[str, str], bos: str | None, eos: str | None
) -> None:
    backend = Tokenizer.from_str(trained_backend().replace(EOS, "<a>").replace(BOS, "<b>"))
    backend.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    expected = tuple(None if token is None else backend.token_to_id(token) for token in (bos, eos))
    assert boundary_tokens(tokenizer) == expected


def test_no_boundary_token_is_an_error_only_where_one_is_asked_for(tmp_path: Path) -> None:
    shards = write_corpus(tmp_path, stdlib_texts())
    backend = Tokenizer.from_str(trained_backend().replace(EOS, "<a>").replace(BOS, "<b>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<a>")
    with pytest.raises(UsageError, match="no BOS, EOS"):
        streaming_token_generator(shards, tokenizer, block_size=8, add_document_boundary_tokens=True)
    with streaming_token_generator(shards, tokenizer, block_size=8) as stream:
        next(stream)


def test_a_real_chat_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(qwen_tokenizer_folder())
    texts = [*stdlib_texts(20), "<|im_start|>user\nHello<|im_end|>\n<|endoftext|>", "Cafe\u0301 e\u0301t\u00e9"]
    shards = write_corpus(tmp_path, texts)
    assert tokenizer.pad_token == "<|endoftext|>"
    bos, eos = boundary_tokens(tokenizer)
    assert bos is None
    assert eos == tokenizer.convert_tokens_to_ids("<|im_end|>")
    backend = (Path(qwen_tokenizer_folder()) / "tokenizer.json").read_text()
    expected = plain_tokens(texts, backend=backend, eos=eos)
    assert expected.count(eos) == len(texts)
    with streaming_token_generator(
        shards, tokenizer, block_size=16, add_document_boundary_tokens=True, epochs=1
    ) as stream:
        assert_same_blocks([chunk.tokens for chunk in stream], plain_blocks(expected, 16))


# --- encoding --------------------------------------------------------------------------------------------------------


def test_truncation_and_padding_of_a_tokenizer_do_not_reach_the_stream() -> None:
    backend = Tokenizer.from_str(trained_backend())
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=600, pad_token=EOS)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS)
    encoder = Encoder(tokenizer)
    assert [id_ for ids in encoder([*stdlib_texts(20)]) for id_ in ids] == plain_tokens(stdlib_texts(20))
    assert encoder.digest == Encoder(tiny_tokenizer()).digest


NORMALIZERS = {"NFKC": normalizers.NFKC(), "lower case": normalizers.Lowercase()}
SPELLED = {"NFKC": "\uff1c/s\uff1e", "lower case": "</S>"}  # what they turn into </s>


def leaky(normalizer: normalizers.Normalizer | None, model: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose EOS, </s>, is an entry of its ordinary vocabulary."""
    letters = [*"abcdefghijklmnopqrstuvwxyz<>/ \n"]
    if model == "unigram":
        backend = Tokenizer(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *((c, -3.0) for c in letters)], 0))
    else:
        words = ["<unk>", "</s>", *letters, "</", "s>"]
        merges = [("<", "/"), ("s", ">"), ("</", "s>")]
        backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
    if normalizer is not None:
        backend.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("model", ["unigram", "bpe"])
@pytest.mark.parametrize("name", NORMALIZERS)
def test_text_that_is_normalized_to_a_special_token_stays_text(model: str, name: str) -> None:
    tokenizer = leaky(NORMALIZERS[name], model)
    encoder = Encoder(tokenizer)
    spelled = SPELLED[name]
    assert tokenizer.backend_tokenizer.encode(f"ab {spelled} c").ids.count(1) == 1
    # One text with it at every place a cut may come, one that holds it twice, and long ones.
    texts = [f"{'a' * before}{spelled}{'c' * after}" for before in range(9) for after in range(9)]
    texts += [f"{spelled}{spelled}", f"ab {spelled} </s> c", f"ab\n{spelled} " * 500, "plain text", ""]
    for text, ids in zip(texts, encoder(texts), strict=True):
        assert 1 not in ids
        pieces = "".join(map(str, tokenizer.convert_ids_to_tokens(ids)))
        assert pieces == tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    # A text beside them, and its first token, are what they would be by themselves.
    assert encoder(["plain text", spelled])[0] == encoder(["plain text"])[0]
    firsts = [str(tokenizer.convert_ids_to_tokens(ids[0])) for ids in encoder(texts[:81])]
    sizes = [len((spelled[: len(first)] if first[0] == "<" else first).encode()) for first in firsts]
    assert encoder.first_token_bytes(texts[:81]) == sizes


def test_a_character_that_is_all_of_a_special_token_is_left_out_and_a_line_end_is_text() -> None:
    replaced = normalizers.Sequence([normalizers.Replace("\u2126", "</s>"), normalizers.Replace("\n", "<pad>")])
    tokenizer = leaky(replaced, "unigram")
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary["model"]["vocab"].append(["<pad>", 0.0])
    backend = Tokenizer.from_str(json.dumps(vocabulary))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    with_omega, with_line_end, plain = Encoder(tokenizer)(["ab\u2126cd", "ab\ncd", "abcd"])
    assert with_omega == plain
    assert with_line_end == [*plain[:2], tokenizer.pad_token_id, *plain[2:]]


def test_a_special_token_that_cannot_be_kept_apart_from_text_is_refused() -> None:
    backend = Tokenizer(models.WordLevel({"#": 0, "<unk>": 1, "a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="#", unk_token="<unk>")
    with pytest.raises(UsageError, match="'#'"):
        Encoder(tokenizer)


class BytesTokenizer(PreTrainedTokenizer):
    """A tokenizer written in Python: one token a byte."""

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(byte): byte for byte in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


def test_a_tokenizer_written_in_python() -> None:
    tokenizer = BytesTokenizer(eos_token="<eos>")
    texts = ["plain text", "é and 日本", f"{'<eos>'} as text"]
    assert tokenizer.eos_token_id == 256
    assert Encoder(tokenizer)(texts) == [list(text.encode()) for text in texts]


class MergingTokenizer(BytesTokenizer):
    """Its ids depend on merges and on a setting, neither of which its vocabulary tells."""

    def __init__(self, merges: Sequence[str], *, lower: bool = False) -> None:
        self.merges, self.lower = merges, lower
        super().__init__(eos_token="<eos>")

    def get_vocab(self) -> dict[str, int]:
        return super().get_vocab() | {"zq": 256, "zqz": 257}

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        path = Path(save_directory, "merges.txt")
        path.write_text("\n".join(self.merges))
        return (str(path),)

    def _tokenize(self, text: str, **_: object) -> list[str]:
        parts = re.findall("|".join([*self.merges, "."]), text.lower() if self.lower else text, re.DOTALL)
        cut = [[part] if part in self.merges else BytesTokenizer._tokenize(self, part) for part in parts]
        return [token for tokens in cut for token in tokens]

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab()[token]


def test_the_digest_of_a_tokenizer_written_in_python_tells_what_its_vocabulary_does_not(tmp_path: Path) -> None:
    one, same = MergingTokenizer(["zq", "zqz"]), MergingTokenizer(["zq", "zqz"])
    others = MergingTokenizer(["zqz", "zq"]), MergingTokenizer(["zq", "zqz"], lower=True)
    assert Encoder(one)(["zqz"]) != Encoder(others[0])(["zqz"])
    digests = [Encoder(tokenizer).digest for tokenizer in (one, same, *others)]
    assert len({*digests}) == 3
    assert digests[0] == digests[1]
    shards = write_corpus(tmp_path, stdlib_texts())

    def stream(tokenizer: PreTrainedTokenizer, position: DataPosition | None = None) -> TokenStream:
        return streaming_token_generator(shards, tokenizer, block_size=64, lanes=1, workers=1, position=position)

    with stream(one) as first:
        chunks = [next(first) for _ in range(4)]
    position = chunks[1].position
    with pytest.raises(UsageError, match=r"tokenizer [0-9a-f]{8} -> [0-9a-f]{8}"):
        stream(others[0], position)
    # A position that was written with the class and the vocabulary alone goes on, and keeps what it holds.
    described = [type(one).__name__, sorted(one.get_vocab().items())]
    earlier = hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()
    position = replace(position, head=replace(position.head, tokenizer=earlier))
    with stream(one, position) as gone_on:
        assert next(gone_on).tokens.tolist() == chunks[2].tokens.tolist()
        assert gone_on.position.head.tokenizer == earlier


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RESUME_TOKENIZER_BATCH_ROWS", "RESUME_TOKENIZER_WORKERS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_settings_come_from_the_argument_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESUME_TOKENIZER_BATCH_ROWS", "17")
    monkeypatch.setenv("RESUME_TOKENIZER_WORKERS", "3")
    assert (batch_rows_setting(), workers_setting()) == (17, 3)
    assert (batch_rows_setting(5), workers_setting(4)) == (5, 4)


@pytest.mark.parametrize("value", ["0", "-1", "many", "2.5", "1000000"])
@pytest.mark.parametrize("name", ["RESUME_TOKENIZER_BATCH_ROWS", "RESUME_TOKENIZER_WORKERS"])
def test_settings_out_of_range_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=rf"{name} is '{value}'; it must be a whole number from 1 to \d+"):
        streaming_token_generator(write_corpus(tmp_path, stdlib_texts()), tiny_tokenizer(), block_size=8)


def test_the_default_is_this_ranks_share_of_the_cores_it_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda self: list(range(12)), raising=False)
    assert workers_setting() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert workers_setting() == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    assert workers_setting() == 1
    monkeypatch.delattr(psutil.Process, "cpu_affinity")
    monkeypatch.setattr(psutil, "cpu_count", lambda: 128)
    assert workers_setting() == 2


def test_a_users_choice_of_tokenizer_parallelism_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    Encoder(tiny_tokenizer())
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    monkeypatch.delenv("TOKENIZERS_PARALLELISM")
    Encoder(tiny_tokenizer())
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
