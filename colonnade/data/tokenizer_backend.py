"""Which library encodes: `tokenizers`, or `fastokens` if it has given the same ids.

That the ids are the same is tested, not assumed: on every Unicode code point in context, on texts chosen to be hard, on
random mixtures, and on the first rows of the run. All but the last depend only on the tokenizer; their result is cached
in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import random
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from colonnade.data.fast_tokenization import PACKAGE, BackendUnavailableError
from colonnade.data.flat_ids import FlatIds, to_lists
from colonnade.data.shards import DamagedUnit, UnitReader, Units
from colonnade.data.text_filter import KEPT, judge
from colonnade.data.tokenization import Encoder, workers_setting
from colonnade.errors import UsageError
from colonnade.files import replace_file
from colonnade.run_settings import TOKENIZER_BACKENDS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Part of the key of a cached result. Increase it with any change of the texts that are compared.
PROOF_VERSION = 1
SAMPLE_ROWS = 256
# Limits on the first rows, in total and per row. With them `tokenizers` takes about a second at most to encode them.
_SAMPLE_CHARACTERS, _ROW_CHARACTERS = 1 << 20, 1 << 16
# First rows that gave the same ids are cached by their hash; this many of the newest are kept.
_REMEMBERED_SAMPLES = 64

CODE_POINTS = 0x110000
_SURROGATES = range(0xD800, 0xE000)  # cannot occur in text
_BATCH, _LINE = 4096, 64

_Encode = Callable[[list[str]], FlatIds]


@dataclass(frozen=True)
class Backend:
    """The backend that was chosen.

    Attributes:
        name: "hf" or "fastokens".
        version: version of `fastokens`; empty for "hf".
        reason: why it was chosen, for the line that reports the choice.
    """

    name: str
    version: str = ""
    reason: str = ""

    @property
    def label(self) -> str:
        """What a checkpoint records: "hf", or "fastokens" and its version."""
        return f"{self.name} {self.version}".strip()

    def __str__(self) -> str:
        return f"tokenizer backend: {self.label}" + (f" ({self.reason})" if self.reason else "")


def open_encoder(
    tokenizer: PreTrainedTokenizerBase,
    backend: str | Backend,
    first_rows: Iterable[str] = (),
    *,
    tell: Callable[[str], None] = logger.debug,
) -> tuple[Encoder, Backend]:
    """An encoder and the backend it uses.

    Args:
        backend: "hf"; "fastokens", an error if it cannot be used; or "auto": `fastokens` if it is shown to give the
            same ids, else "hf" with the reason. A `Backend` is the result of an earlier call and is not checked again;
            if this machine lacks exactly that version, it falls back to "hf", which gives the same ids.
        first_rows: documents of the run; the first `SAMPLE_ROWS` are compared. Read only if needed.
        tell: receives one line before a comparison that takes long.

    Raises:
        UsageError: "fastokens" was requested and cannot be used or gives different ids; `backend` is none of these.
    """
    asked = backend.name if isinstance(backend, Backend) else backend
    if asked not in TOKENIZER_BACKENDS:
        raise UsageError(f"tokenizer_backend is {asked!r}; it must be one of {', '.join(TOKENIZER_BACKENDS)}")
    encoder = Encoder(tokenizer)
    if asked == "hf":
        return encoder, backend if isinstance(backend, Backend) else Backend("hf")
    try:
        fast = encoder.load_fast()
        if not isinstance(backend, Backend):
            backend = Backend(PACKAGE, fast.version, _prove(encoder, fast, fast.version, first_rows, tell))
        elif backend.version != fast.version:
            raise BackendUnavailableError(f"{backend.version} was chosen and {fast.version} is installed here")
    except BackendUnavailableError as problem:
        if asked == PACKAGE and not isinstance(backend, Backend):
            raise UsageError(
                f"--tokenizer-backend {PACKAGE}: {PACKAGE} {problem}; use --tokenizer-backend auto or hf"
            ) from problem
        chosen = Backend("hf", reason=f"{PACKAGE} {problem}")
        if isinstance(backend, Backend):
            logger.warning("%s", chosen)
        return encoder, chosen
    encoder.fast = fast
    return encoder, backend


def read_first_rows(units: Units, text_column: str) -> Iterator[str]:
    """The documents of a corpus in file order, without the rows and units that the training stream drops."""
    with closing(UnitReader(text_column)) as reader:
        for unit in range(len(units)):
            try:
                for window in reader.windows(*units.locate(unit)):
                    if isinstance(window, np.ndarray):
                        return  # a token shard has no documents to encode
                    for start in range(0, len(window), SAMPLE_ROWS):
                        texts, verdicts = judge(window.slice(start, SAMPLE_ROWS))
                        yield from texts.filter(verdicts == KEPT).to_pylist()
            except DamagedUnit:
                continue


# --- comparing the ids -----------------------------------------------------------------------------------------------


def _prove(
    encoder: Encoder, fast: _Encode, version: str, first_rows: Iterable[str], tell: Callable[[str], None]
) -> str:
    """Check that `fast` gives the same ids as `encoder`, except for checks whose result is cached. Returns a summary.

    Raises:
        BackendUnavailableError: it gives different ids; the message says for which text.
    """
    started = time.perf_counter()
    sample = _sample(first_rows)
    sample_hash = hashlib.blake2b("\0".join(sample).encode(), digest_size=16).hexdigest()
    path = _cache_file(encoder.digest, version)
    known = _read_cache(path)
    difference = known["difference"]
    if not known["compared"]:
        tell(
            "comparing tokenizer backends on every code point, once for this tokenizer: about half a minute "
            "(--tokenizer-backend hf skips it)"
        )
        difference = _first_difference(encoder.flat, fast, _proof_batches(encoder))
    if difference is None and sample_hash not in known["samples"]:
        found = first_difference_in(encoder.flat, fast, sample)
        if found is not None:  # specific to these rows, so it is not cached as a result for the tokenizer
            difference, sample_hash = f"in the first {len(sample)} rows, {found}", ""
    samples = [*dict.fromkeys([*known["samples"], *([sample_hash] if difference is None else [])])]
    if sample_hash:
        _write_cache(path, {"compared": True, "difference": difference, "samples": samples[-_REMEMBERED_SAMPLES:]})
    if difference is not None:
        raise BackendUnavailableError(f"{version} gives other ids: {difference}")
    how = "found before" if known["compared"] else f"found in {time.perf_counter() - started:.1f} s"
    rows = f" and the first {len(sample)} rows" if sample else ""
    return f"ids identical on every code point{rows}, {how}"


def _sample(rows: Iterable[str]) -> list[str]:
    texts: list[str] = []
    left = _SAMPLE_CHARACTERS
    for row in itertools.islice(rows, SAMPLE_ROWS):
        texts.append(row[: min(_ROW_CHARACTERS, left)])
        left -= len(texts[-1])
        if left <= 0:
            break
    return texts


def _first_difference(reference: _Encode, fast: _Encode, batches: Iterable[Callable[[], list[str]]]) -> str | None:
    """Compare on threads. The threads also create the batches, since all of them at once would be large."""
    with ThreadPoolExecutor(workers_setting(), thread_name_prefix="tokenizer-proof") as pool:
        outcomes = pool.map(lambda make: first_difference_in(reference, fast, make()), batches)
        try:
            return next((outcome for outcome in outcomes if outcome is not None), None)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def first_difference_in(reference: _Encode, fast: _Encode, texts: list[str]) -> str | None:
    """The first difference between the ids of two encoders on `texts`, as text; None if there is none."""
    if not texts:
        return None
    expected = reference(texts)
    try:
        got = fast(texts)
    except (ValueError, RuntimeError) as error:
        return f"it fails ({' '.join(str(error).split())[:100]})"
    if np.array_equal(expected.ids, got.ids) and np.array_equal(expected.lengths, got.lengths):
        return None
    for text, right, wrong in zip(texts, to_lists(expected), to_lists(got), strict=False):
        if right != wrong:
            at = next((i for i, pair in enumerate(zip(right, wrong, strict=False)) if pair[0] != pair[1]), 0)
            where = f"from token {at} on " if at else ""
            return f"{_shown(text)} gives {where}{wrong[at : at + 4]}, not {right[at : at + 4]}"
    return f"{len(got.lengths)} documents come back for {len(texts)}"


def _shown(text: str) -> str:
    return ascii(text) if len(text) <= 24 else f"a text that begins {text[:24]!a}"


def _proof_batches(encoder: Encoder) -> Iterator[Callable[[], list[str]]]:
    """Functions that each create one batch of texts to compare."""
    yield lambda: hard_texts(encoder)
    yield random_texts
    for start in range(0, CODE_POINTS, _BATCH):
        yield partial(code_point_texts, start, start + _BATCH)


def code_point_texts(start: int, stop: int) -> list[str]:
    """Texts with every character from code point `start` up to (excluding) `stop`.

    Each character assigned in Python's version of Unicode is a text of its own, and also occurs in lines between
    letters, digits, spaces and apostrophes, where the patterns of pre-tokenizers depend on its class. The others (six
    of seven, all the same to every pattern) only occur in lines between a letter and a line end: one text for each
    would take most of the time.
    """
    found = [chr(code) for code in range(start, min(stop, CODE_POINTS)) if code not in _SURROGATES]
    assigned = [character for character in found if unicodedata.category(character) not in ("Cn", "Co")]
    contexts = {character: f"a{character}\n" for character in found}
    contexts |= {c: f"a{c}1{c} {c}'{c}" for c in assigned}
    lines = [*contexts.values()]
    return assigned + ["".join(lines[begin : begin + _LINE]) for begin in range(0, len(lines), _LINE)]


_PIECES = (
    *"abzAZ019'’.,!?-_/\\#*(){}[]<>|@\"",
    *" \t\r\n\0\x0b\x0c\x1c\x85\xa0\u2003\u2028\u3000\u200b\u200d\ufeff\ufffd",
    *("  ", "\r\n", "\n\n", "'s", "'ll", "'RE", "it's", "the", "THE", "123", "12345"),
    *"éßſıİÅµΩǅيकกㅎ한日本語ⅷ٣½²",
    *(
        "e\u0301",
        "\u0301",
        "\u0323\u0307",
        "\u1100\u1161\u11a8",
        "\ufb01",
        "\u212b",
        "👩‍👩‍👧",
        "🇫🇷",
        "1️⃣",
        "𝔘",
        "\U000e0041",
    ),
)


def random_texts(count: int = 10_000, longest: int = 16) -> list[str]:
    """Random mixtures of strings that pre-tokenizer patterns treat differently; the same texts on every call."""
    generator = random.Random(0)
    return ["".join(generator.choices(_PIECES, k=generator.randint(1, longest))) for _ in range(count)]


def hard_texts(encoder: Encoder) -> list[str]:
    """Texts that are known to be hard for tokenizers, and the spellings of this one's special and added tokens."""
    texts = [
        "",
        *(white * count for white in (" ", "\n", "\t", "\r\n", "\u3000", " \n") for count in (1, 2, 3, 17, 5000)),
        *(f"a{white * 300}b" for white in (" ", "\n", "\t")),
        *(letter * 3000 for letter in ("a", "A", "1", "é", "日", "'", "=", "e\u0301", "👍", "\u0301")),
        "a\r\nb\rc\n\nd\r\n\r\n  e\n \n f ",
        "\0a\0\0 b\0",
        "Привет, мир! שלום עולם مرحبا بالعالم नमस्ते สวัสดี 안녕하세요 こんにちは 你好 ქართული",
        "I'm you're he'll we've they'd it's I'M YOU'RE IT'S it\u2019s it'ſ don't 'tis",
        "x=1234567890;y=0.1e-9;z=0xDEADBEEF_00 ١٢٣٤٥ १२३ ⅷ½²",
        "".join(_PIECES) * 200,
    ]
    spellings = [*dict.fromkeys([*encoder.control_tokens, *encoder.added_tokens()])][:1000]
    texts += [text for token in spellings for text in (token, f"a {token} b", f"a{token}b", f"\n {token}{token}  \n")]
    return texts


# --- cached results --------------------------------------------------------------------------------------------------


def _cache_file(digest: str, version: str) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    key = json.dumps([digest, version, metadata.version("tokenizers"), PROOF_VERSION])
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    return Path(root).expanduser() / "colonnade" / "tokenizer-backends" / f"{name}.json"


def _read_cache(path: Path) -> dict[str, Any]:
    """The cached result: `compared`, `difference` and `samples`. A damaged file counts as a missing one."""
    nothing: dict[str, Any] = {"compared": False, "difference": None, "samples": []}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return nothing
    is_whole = (
        isinstance(found, dict)
        and found.keys() == nothing.keys()
        and found["compared"] is True
        and isinstance(found["difference"], str | None)
        and isinstance(found["samples"], list)
        and all(isinstance(sample, str) for sample in found["samples"])
    )
    return found if is_whole else nothing


def _write_cache(path: Path, found: dict[str, Any]) -> None:
    """Write the cached result. If that fails, the only cost is another comparison at the next start."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(found))
    except OSError as error:
        logger.info("%s cannot be written (%s)", path, error.strerror)
