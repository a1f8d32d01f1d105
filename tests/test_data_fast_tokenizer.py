"""The fast encoder: the ids of `tokenizers`, shown before it is used; and what happens where they are not."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from colonnade.data import fast_tokenization, tokenizer_backend
from colonnade.data.fast_tokenization import BackendUnavailableError, FastEncoder
from colonnade.data.flat_ids import FlatIds, flatten, to_lists
from colonnade.data.tokenization import BoundaryTokens, Encoder
from colonnade.data.tokenizer_backend import Backend, hard_texts, open_encoder, random_texts
from colonnade.errors import UsageError
from colonnade.run_settings import RunSettings
from data_helpers import (
    BOS,
    EOS,
    assert_same_blocks,
    plain_blocks,
    plain_tokens,
    qwen_tokenizer_folder,
    stdlib_texts,
    trained_backend,
    trained_bpe,
    write_corpus,
)
from data_processing import load_tokenizer, streaming_token_generator
from run.data import run_tokenizer, settle_backend

fastokens = pytest.importorskip("fastokens")

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
STYLES = ("gpt2", "llama3", "llama3-nfc")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder of this test, nothing kept from others, and a proof of 4,096 code points: all take 5 s."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fast_tokenization, "_shared", {})
    monkeypatch.setattr(tokenizer_backend, "CODE_POINTS", 4096)
    return tmp_path / "cache"


@cache
def trained(style: str) -> str:
    """A `trained_bpe` of 1,000 entries."""
    pre_tokenizer = None
    if style != "gpt2":
        split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    normalizer = normalizers.NFC() if style.endswith("nfc") else None
    return trained_bpe(stdlib_texts(), 1000, pre_tokenizer=pre_tokenizer, normalizer=normalizer)


def made(style: str) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained(style)), eos_token=EOS)


def reference(serialized: str, texts: Sequence[str]) -> list[list[int]]:
    """Each text encoded alone with the `tokenizers` API."""
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.encode_special_tokens = True
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]


class Changed:
    """`fastokens.Tokenizer`, told to give other ids for some texts, or to fail on them; counts the texts given."""

    texts = 0
    wrong: Callable[[str], bool] = staticmethod(lambda text: False)
    fails: Callable[[str], bool] = staticmethod(lambda text: False)

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    @classmethod
    def from_json_str(cls, serialized: str) -> Changed:
        return cls(REAL.from_json_str(serialized))

    def encode_batch_flat(self, texts: list[str], **options: bool) -> tuple[bytes, bytes]:
        type(self).texts += len(texts)
        if any(map(type(self).fails, texts)):
            raise ValueError("match limit exceeded")
        ids, offsets = self._inner.encode_batch_flat(texts, **options)
        tokens = np.frombuffer(ids, np.uint32).copy()
        for text, begin in zip(texts, np.frombuffer(offsets, np.uint64), strict=False):
            if type(self).wrong(text):
                tokens[int(begin)] += 1
        return tokens.tobytes(), offsets


REAL = fastokens.Tokenizer


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> type[Changed]:
    """The package with a fresh `Changed` for its tokenizer."""
    fake = type("Changed", (Changed,), {})
    monkeypatch.setattr(fastokens, "Tokenizer", fake)
    return fake


def fast_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """One that encodes with fastokens, without any check that its ids are the same."""
    encoder = Encoder(tokenizer)
    encoder.fast = encoder.load_fast()
    return encoder


# --- the same ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_those_of_tokenizers(style: str) -> None:
    encoder = fast_encoder(made(style))
    texts = [*stdlib_texts(), *hard_texts(encoder), *random_texts(2000)]
    assert encoder(texts) == reference(trained(style), texts)
    assert encoder.digest == Encoder(made(style)).digest


def test_a_real_tokenizer() -> None:
    folder = qwen_tokenizer_folder()
    encoder, backend = open_encoder(load_tokenizer(folder), "auto", stdlib_texts())
    assert backend.name == "fastokens"
    texts = [*stdlib_texts(), "<|im_start|>user\nHello<|im_end|>\n<|endoftext|>", "Cafe\u0301 e\u0301t\u00e9"]
    assert encoder(texts) == reference((Path(folder) / "tokenizer.json").read_text(), texts)


def test_all_code_points_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the number of code points, above all
    seen: set[str] = set()
    for start in range(0, tokenizer_backend.CODE_POINTS, 1 << 16):
        seen.update(*tokenizer_backend.code_point_texts(start, start + (1 << 16)))
    assert seen == {chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code <= 0xDFFF}
    assert len(seen) == 1_112_064


def test_auto_proves_all_code_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_backend, "CODE_POINTS", 0x110000)
    _, backend = open_encoder(made("llama3-nfc"), "auto", stdlib_texts())
    assert backend.label == f"fastokens {fast_tokenization.package_version()}"
    assert "every code point and the first 60 rows, found in" in str(backend)


def test_special_tokens_spelled_in_text_stay_text() -> None:
    encoder = fast_encoder(made("gpt2"))
    control = {encoder.flat([f"{EOS}a{BOS} {EOS}"]).ids.tobytes(), encoder.flat([EOS]).ids.tobytes()}
    ids = np.frombuffer(b"".join(control), np.int32)
    assert len(ids) > 10
    assert not {0, 1}.intersection(ids.tolist())  # the ids of both


def test_text_that_is_normalized_to_a_special_token_stays_text() -> None:
    described = json.loads(trained("llama3-nfc"))
    index = described["model"]["vocab"][";;"] = len(described["model"]["vocab"])
    described["model"]["merges"].append([";", ";"])
    serialized = json.dumps(described)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(serialized), eos_token=";;")
    assert tokenizer.eos_token_id == index
    texts = ["\u037e\u037e", "a \u037e\u037e b", ";;", "no such text"]  # NFC makes a semicolon of U+037E
    assert [index in ids for ids in reference(serialized, texts)] == [True, True, True, False]
    encoder, fast = Encoder(tokenizer), fast_encoder(tokenizer)
    assert fast(texts) == encoder(texts)
    assert not any(index in ids for ids in fast(texts))
    decoded = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in fast(texts)]
    assert decoded == [";;", "a ;; b", ";;", "no such text"]


@pytest.mark.parametrize("boundaries", [None, BoundaryTokens(1, 0), BoundaryTokens(None, 7), BoundaryTokens(7, None)])
def test_boundary_tokens_in_flat_ids(boundaries: BoundaryTokens | None) -> None:
    documents = [[5, 6], [], [9], [1, 2, 3], []]
    flat = FlatIds(np.array([5, 6, 9, 1, 2, 3], np.int32), np.array([2, 0, 1, 3, 0]))
    before, after = ([] if token is None else [token] for token in boundaries or (None, None))
    whole = [[*before, *document, *after] for document in documents]
    tokens, ends = flatten(flat, boundaries)
    assert to_lists(flat) == documents
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [token for document in whole for token in document]
    assert ends.tolist() == np.cumsum([len(document) for document in whole]).tolist()


def test_encoding_starts_no_threads_of_its_own() -> None:
    encoder = fast_encoder(made("llama3"))
    process = psutil.Process()
    before = process.num_threads()
    encoder(["".join(random_texts(2000)) * 20] * 4)
    assert process.num_threads() == before


# --- in the stream ---------------------------------------------------------------------------------------------------


def test_a_stream_goes_on_with_the_other_backend(tmp_path: Path) -> None:
    shards = write_corpus(tmp_path, stdlib_texts())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(trained_backend()), eos_token=EOS)
    eos = tokenizer.eos_token_id
    bos = Tokenizer.from_str(trained_backend()).token_to_id(BOS)
    options: dict[str, Any] = {"block_size": 64, "add_document_boundary_tokens": True, "epochs": 1}
    expected = plain_blocks(plain_tokens(stdlib_texts(), bos=bos, eos=eos), 64)
    for order in (("hf", "fastokens"), ("fastokens", "auto"), ("auto", "hf")):
        with streaming_token_generator(shards, tokenizer, backend=order[0], **options) as stream:
            blocks = [next(stream).tokens for _ in range(11)]
            position = stream.position
        with streaming_token_generator(shards, tokenizer, backend=order[1], position=position, **options) as stream:
            blocks += [chunk.tokens for chunk in stream]
        assert_same_blocks(blocks, expected)


def test_the_first_rows_are_those_that_the_stream_keeps(tmp_path: Path, changed: type[Changed]) -> None:
    texts = ["12345 67890", "", *stdlib_texts()]
    shards = write_corpus(tmp_path, texts)
    seen: list[str] = []
    changed.fails = staticmethod(lambda text: seen.append(text) or False)  # type: ignore[func-returns-value]
    with streaming_token_generator(shards, made("gpt2"), block_size=64, backend="fastokens"):
        pass
    assert "12345 67890" not in seen
    assert set(stdlib_texts()) <= set(seen)


# --- other ids -------------------------------------------------------------------------------------------------------


def test_a_difference_at_one_code_point_is_found(changed: type[Changed]) -> None:
    changed.wrong = staticmethod(lambda text: text == "\u0e01")
    encoder, backend = open_encoder(made("llama3"), "auto")
    assert backend.label == "hf"
    assert r"gives other ids: '\u0e01' gives [" in str(backend)
    assert encoder(["\u0e01"]) == reference(trained("llama3"), ["\u0e01"])
    with pytest.raises(UsageError, match=r"--tokenizer-backend fastokens: .*'\\u0e01' gives .*auto or hf"):
        open_encoder(made("llama3"), "fastokens")


def test_a_difference_in_the_first_rows_is_found(changed: type[Changed]) -> None:
    rows = [f"This is row {number}." for number in range(300)]
    changed.wrong = staticmethod(lambda text: text == rows[255])
    _, backend = open_encoder(made("gpt2"), "auto", rows)
    assert (backend.name, "in the first 256 rows" in backend.reason) == ("hf", True)
    # It is not the tokenizer's fault for other data.
    assert open_encoder(made("gpt2"), "auto", rows[:255])[1].name == "fastokens"
    assert open_encoder(made("gpt2"), "auto", rows)[1].name == "hf"


def test_failing_on_a_text_is_a_difference(changed: type[Changed]) -> None:
    changed.fails = staticmethod(lambda text: text == "\x7f")
    assert "fails (match limit exceeded)" in open_encoder(made("gpt2"), "auto")[1].reason


def test_what_it_cannot_encode_later_is_encoded_by_tokenizers(changed: type[Changed]) -> None:
    encoder, backend = open_encoder(made("gpt2"), "auto")
    assert backend.name == "fastokens"
    changed.fails = staticmethod(lambda text: "boom" in text)
    assert encoder(["a", "boom"]) == reference(trained("gpt2"), ["a", "boom"])


# --- not usable ------------------------------------------------------------------------------------------------------


def test_a_unigram_tokenizer_falls_back_with_the_reason() -> None:
    entries = [("<unk>", 0.0), *((letter, -1.0) for letter in "abc\u2581")]
    backend = Tokenizer(models.Unigram(entries, 0, byte_fallback=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    encoder, chosen = open_encoder(tokenizer, "auto")
    assert "cannot use this tokenizer: model error: unsupported model type: Unigram" in str(chosen)
    assert encoder(["abc"]) == [backend.encode("abc").ids]
    with pytest.raises(UsageError, match="unsupported model type"):
        open_encoder(tokenizer, "fastokens")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    _, chosen = open_encoder(made("gpt2"), "auto")
    assert str(chosen) == "tokenizer backend: hf (fastokens is not installed: pip install 'colonnade[fast]')"
    with pytest.raises(UsageError, match="fastokens is not installed"):
        open_encoder(made("gpt2"), "fastokens")
    with pytest.raises(BackendUnavailableError):
        Encoder(made("gpt2")).load_fast()


def test_a_settled_choice_is_not_proved_again(
    changed: type[Changed], caplog: pytest.LogCaptureFixture, own_cache: Path
) -> None:
    settled = Backend("fastokens", fast_tokenization.package_version())
    encoder, backend = open_encoder(made("gpt2"), settled)
    assert (backend, changed.texts) == (settled, 0)
    assert isinstance(encoder.fast, FastEncoder)
    assert not own_cache.exists()
    encoder, backend = open_encoder(made("gpt2"), Backend("fastokens", "0.0.1"))
    assert (backend.label, encoder.fast) == ("hf", None)
    assert "0.0.1 was chosen" in caplog.text


def test_hf_as_asked_for_reads_nothing() -> None:
    def rows() -> Any:
        raise AssertionError
        yield

    assert str(open_encoder(made("gpt2"), "hf", rows())[1]) == "tokenizer backend: hf"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UsageError, match=r"tokenizer_backend is 'rust'; it must be one of auto, hf, fastokens"):
        open_encoder(made("gpt2"), "rust")


def test_a_run_goes_on_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made("gpt2").save_pretrained(tmp_path / "tokenizer")
    write_corpus(tmp_path, stdlib_texts())
    settings = RunSettings(data_glob=str(tmp_path / "*.parquet"), tokenizer_path=str(tmp_path / "tokenizer"))
    notes: list[str] = []
    tokenizer = run_tokenizer(settings)
    chosen = settle_backend(settings, tokenizer, {}, notes)
    assert chosen.label == f"fastokens {fast_tokenization.package_version()}"
    monkeypatch.setitem(sys.modules, "fastokens", None)
    monkeypatch.setattr(fast_tokenization, "_shared", {})
    assert settle_backend(settings, tokenizer, {"tokenizer_backend": chosen.label}, notes).label == "hf"
    assert notes == [
        f"{chosen}",
        "tokenizer backend: hf (fastokens is not installed: pip install 'colonnade[fast]'); "
        f"{chosen.label} until now, the same ids",
    ]


@pytest.mark.parametrize("asked", ["auto", "hf"])
def test_a_start_prints_that_it_compares(asked: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made("gpt2").save_pretrained(tmp_path / "tokenizer")
    write_corpus(tmp_path, stdlib_texts())
    settings = RunSettings(
        data_glob=f"{tmp_path}/*.parquet", tokenizer_path=str(tmp_path / "tokenizer"), tokenizer_backend=asked
    )
    settle_backend(settings, run_tokenizer(settings), {}, [])
    assert ("comparing tokenizer backends" in capsys.readouterr().out) == (asked == "auto")


def test_the_first_rows_are_those_of_the_first_files_that_can_be_used(tmp_path: Path) -> None:
    made("gpt2").save_pretrained(tmp_path / "tokenizer")
    for index in range(5):
        (tmp_path / f"bad_{index}.parquet").write_bytes(b"not a Parquet file")
    settings = RunSettings(data_glob=f"{tmp_path}/*.parquet", tokenizer_path=str(tmp_path / "tokenizer"))
    tokenizer = run_tokenizer(settings)
    with pytest.raises(UsageError, match=r"bad_0\.parquet cannot be read"):
        settle_backend(settings, tokenizer, {}, [])
    write_corpus(tmp_path, stdlib_texts())  # after them in order
    assert "and the first 60 rows" in settle_backend(settings, tokenizer, {}, []).reason
    settings = settings.replace(data_glob=f"{tmp_path}/bad_0.parquet,memory://absent.parquet,{tmp_path}/part_0.parquet")
    with pytest.raises(UsageError, match=r"absent\.parquet"):  # one that is missing is never skipped
        settle_backend(settings, tokenizer, {}, [])


# --- what is remembered ----------------------------------------------------------------------------------------------


def test_the_second_time_is_remembered(changed: type[Changed], own_cache: Path) -> None:
    def texts_compared(rows: Sequence[str]) -> int:
        before = changed.texts
        assert open_encoder(made("gpt2"), "auto", rows)[1].name == "fastokens"
        return changed.texts - before

    first = texts_compared(stdlib_texts())
    assert first > 10_000
    assert texts_compared(stdlib_texts()) == 0
    assert texts_compared(stdlib_texts(20)) == 20
    assert texts_compared(stdlib_texts(20)) == 0
    (file,) = own_cache.rglob("*.json")
    for damage in ("", "{", "[]", "{}", json.dumps({"compared": True}), file.read_text().replace("true", "1")):
        file.write_text(damage)
        assert texts_compared(stdlib_texts()) == first
    assert texts_compared(stdlib_texts()) == 0


def test_a_difference_is_remembered_too(changed: type[Changed]) -> None:
    changed.wrong = staticmethod(lambda text: text == "A")
    first = open_encoder(made("gpt2"), "auto")[1]
    compared = changed.texts
    assert first.name == "hf"
    assert open_encoder(made("gpt2"), "auto")[1] == first
    assert changed.texts == compared


def test_another_tokenizer_or_version_is_proved_for_itself(
    changed: type[Changed], monkeypatch: pytest.MonkeyPatch
) -> None:
    open_encoder(made("gpt2"), "auto")
    once = changed.texts
    open_encoder(made("llama3"), "auto")
    assert changed.texts == 2 * once
    monkeypatch.setattr(fast_tokenization, "package_version", lambda: "99")
    assert open_encoder(made("gpt2"), "auto")[1].label == "fastokens 99"
    assert changed.texts == 3 * once


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        assert "found in" in open_encoder(made("gpt2"), "auto")[1].reason


def test_a_comparison_is_announced_before_it_begins_and_only_then(changed: type[Changed]) -> None:
    """The texts compared so far, at each line."""
    told: list[tuple[str, int]] = []
    for _ in range(2):
        open_encoder(made("gpt2"), "auto", stdlib_texts(20), tell=lambda line: told.append((line, changed.texts)))
    (line, compared), *more = told
    assert line.startswith("comparing tokenizer backends")
    assert "--tokenizer-backend hf skips it" in line
    assert (compared, more) == (0, [])
    assert changed.texts > 10_000
