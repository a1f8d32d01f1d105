"""From text to token ids: loading a tokenizer, boundary tokens, and encoding on threads.

Text that spells a special token (`<|endoftext|>` in a web page about tokenizers) is encoded as plain text: special
token ids enter the stream only as requested boundary tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from colonnade.cores import usable_cores
from colonnade.data.control_tokens import ControlTokens, Encode
from colonnade.data.fast_tokenization import BackendUnavailableError, FastEncoder, shared_encoder
from colonnade.data.flat_ids import FlatIds, flatten, to_flat, to_lists
from colonnade.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS_VARIABLE = "RESUME_TOKENIZER_BATCH_ROWS"
WORKERS_VARIABLE = "RESUME_TOKENIZER_WORKERS"
DEFAULT_BATCH_ROWS = 64
MAX_BATCH_ROWS = 65_536
MAX_WORKERS = 256
# With more threads, they wait for the GIL while ids are converted to arrays (about 3% of the work).
DEFAULT_MAX_WORKERS = 16

# Names looked up among the special tokens of a tokenizer that declares no BOS or EOS, most common first.
KNOWN_BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "[BOS]")
KNOWN_EOS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "[EOS]")

# What transformers raises for a folder without a tokenizer depends on the folder's other contents.
_NOT_LOADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RecursionError)
# What Python code raises for characters that its vocabulary lacks.
_NOT_ENCODABLE = (ValueError, KeyError, TypeError, AttributeError)
# Texts whose ids are part of the digest of a tokenizer written in Python.
_PROBES = (
    "The quick brown fox jumps over the lazy dog. IT'S 1,234.5 -- ISN'T IT?",
    "  Two  spaces,\ttab,\n\nlines \r\n",
    "na\u00efve cafe\u0301 \uff21\uff22\uff23 \ufb01n \u6f22\u5b57 \u041c\u043e\u0441\u043a\u0432\u0430 \U0001f600",
    "def f(x_1):\n    return {'a': x_1 ** 2}  # <tag/>",
)
_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")


# --- loading ---------------------------------------------------------------------------------------------------------


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or, where no such folder exists, from the Hugging Face hub.

    A missing padding token falls back to EOS. Code that comes with the tokenizer runs only with `trust_remote_code`.

    Raises:
        UsageError: `path` is not a tokenizer, cannot be reached, or needs its own code to run.
    """
    folder = Path(path).expanduser()
    looks_local = folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        meant = f"its folder {str(folder.parent)!r}" if folder.suffix == ".json" and folder.exists() else "a folder"
        raise UsageError(f"tokenizer folder {path!r} {problem}; give {meant} with a tokenizer.json or a hub name")
    name = str(folder) if looks_local else path
    try:
        tokenizer = _tokenizer_class(folder).from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:
        # The Rust library raises a bare Exception for every file it cannot use.
        if type(error) is not Exception and not isinstance(error, _NOT_LOADABLE):
            raise
        raise UsageError(f"{path!r} is not a tokenizer that can be loaded: {_why_not_loadable(error)}") from error
    if isinstance(tokenizer, bool) or len(tokenizer) == 0:
        raise UsageError(f"{path!r} is not a tokenizer that can be loaded: its vocabulary is empty")
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _why_not_loadable(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it comes with code of its own; read that code, then give --trust-remote-code"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0].removesuffix(" from one of:") if lines else type(error).__name__
    missing = "a file of it lacks " if isinstance(error, KeyError) else ""
    return f"{missing}{reason}; give --tokenizer-path a folder with a whole tokenizer.json, or a hub name"


def _tokenizer_class(folder: Path) -> Any:
    """AutoTokenizer, or the class it would choose if the folder permits only one.

    Importing AutoTokenizer takes a second longer (it knows every model), and every start of a run would pay for that.
    For a folder with a tokenizer.json, a generic class name, no model config and no custom code, only one class is
    possible.
    """
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        config = {}
    is_generic = isinstance(config, dict) and config.get("tokenizer_class") in _GENERIC_CLASSES
    is_plain = "auto_map" not in config and not (folder / "config.json").exists()
    if is_generic and is_plain and (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The highest id plus one, which is the vocabulary size a model needs. It may exceed the number of entries, since
    ids may have gaps."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


# --- boundary tokens -------------------------------------------------------------------------------------------------


class BoundaryTokens(NamedTuple):
    """Ids put before and after each document, or None. At least one of them is set."""

    bos: int | None
    eos: int | None


def boundary_tokens(tokenizer: PreTrainedTokenizerBase) -> BoundaryTokens:
    """The tokens that mark where documents begin and end.

    BOS is the declared one, else a special token with a well-known name (`KNOWN_BOS`), else CLS, else none: chat
    tokenizers often have no BOS, and then EOS alone separates documents. EOS is the declared one, else a well-known
    special token (`KNOWN_EOS`), else SEP. The padding token is never used: if documents ended with it, the end of a
    document could not be told from padding.

    Raises:
        UsageError: the tokenizer has neither.
    """
    special = _special_tokens(tokenizer)
    bos = _first_id(tokenizer.bos_token_id, *map(special.get, KNOWN_BOS), tokenizer.cls_token_id)
    eos = _first_id(tokenizer.eos_token_id, *map(special.get, KNOWN_EOS), tokenizer.sep_token_id)
    if bos is None and eos is None:
        raise UsageError(
            f"tokenizer {tokenizer.name_or_path!r} has no BOS, EOS, CLS or SEP token and none of the well-known ones; "
            "leave out --add-document-boundary-tokens or add an EOS token to the tokenizer"
        )
    return BoundaryTokens(bos, eos)


def puts_before(tokenizer: PreTrainedTokenizerBase, prefix: int) -> bool:
    """Whether the only special token that the tokenizer adds to a text is `prefix`, before it."""
    text = "text"
    return tokenizer.encode(text, add_special_tokens=True) == [
        prefix,
        *tokenizer.encode(text, add_special_tokens=False),
    ]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Spelling and id of every special token, whether declared by role (BOS, EOS, ...) or only added as special."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    tokens = {str(token): index for index, token in added.items() if token.special}
    tokens.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return tokens


def _first_id(*candidates: int | None) -> int | None:
    return next((candidate for candidate in candidates if candidate is not None), None)


# --- settings --------------------------------------------------------------------------------------------------------


def batch_rows_setting(batch_rows: int | None = None) -> int:
    """Rows encoded in one call: the argument, else RESUME_TOKENIZER_BATCH_ROWS, else 64. Raises UsageError."""
    if batch_rows is not None:
        return _within("batch_rows", batch_rows, MAX_BATCH_ROWS)
    return _from_environment(BATCH_ROWS_VARIABLE, MAX_BATCH_ROWS) or DEFAULT_BATCH_ROWS


def workers_setting(workers: int | None = None) -> int:
    """Encoding threads: the argument, else RESUME_TOKENIZER_WORKERS, else this rank's share of the cores it may use.

    Raises:
        UsageError: the value is not an integer within the limits.
    """
    if workers is not None:
        return _within("workers", workers, MAX_WORKERS)
    given = _from_environment(WORKERS_VARIABLE, MAX_WORKERS)
    if given is not None:
        return given
    ranks = _from_environment("LOCAL_WORLD_SIZE", 1 << 20) or 1
    return max(1, min(usable_cores() // ranks, DEFAULT_MAX_WORKERS))


def _from_environment(variable: str, limit: int) -> int | None:
    text = os.environ.get(variable, "").strip()
    return _within(variable, text, limit) if text else None


def _within(name: str, value: int | str, limit: int) -> int:
    try:
        number = int(value)
    except ValueError:
        number = 0
    if not 1 <= number <= limit:
        raise UsageError(f"{name} is {value!r}; it must be a whole number from 1 to {limit}")
    return number


# --- encoding --------------------------------------------------------------------------------------------------------


class Encoder:
    """Encodes texts with a private copy of a tokenizer's Rust backend, which settings changed elsewhere cannot affect.

    Attributes:
        digest: identifies the tokenizer in a data position, whichever library encodes.
        earlier_digest: of a tokenizer written in Python, what earlier positions hold in its place; else None.
        control_tokens: spellings of the special tokens, except the unknown token.
        fast: the `fastokens` encoder if it is used, else None. Set by `colonnade.data.tokenizer_backend` after a check
            that it gives the same ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises UsageError if a single character of text would be encoded as a special token that it spells."""
        # Makes each call encode on the calling thread, so this rank uses exactly the threads set for it. The library's
        # own pool would use every core of the machine in each rank. A user's setting wins.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        rust = getattr(tokenizer, "backend_tokenizer", None)
        self._rust = None if rust is None else _private_copy(rust)
        self._encode: Encode
        self.earlier_digest = None
        if self._rust is not None:
            self.digest = hashlib.blake2b(self._rust.to_str().encode(), digest_size=16).hexdigest()
            self._encode = _rust_encoder(self._rust)
        else:
            self._encode = _python_encoder(tokenizer)
            self.earlier_digest, self.digest = _python_digests(tokenizer, self._encode)
        self._control = ControlTokens(_control_tokens(tokenizer), self._encode, tokenizer.name_or_path)
        self.control_tokens = self._control.spellings
        self.fast: FastEncoder | None = None

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        return to_lists(self.flat(texts))

    def flat(self, texts: list[str]) -> FlatIds:
        """Token ids of the texts, concatenated, without special tokens."""
        return self._control.encode(texts, self._encode_whole)

    def first_token_bytes(self, texts: list[str]) -> list[int]:
        """UTF-8 bytes of each text up to the end of its first token, or of the whole text if it has no token.

        If the token ends inside a character, that character counts as a whole.

        Raises:
            UsageError: the tokenizer does not report where its tokens end.
        """
        if self._rust is None:
            raise UsageError(
                "the tokenizer is written in Python and does not tell where its tokens end; give "
                "--document-prefix token"
            )
        pieces = [self._control.first_piece(text) for text in texts]
        encodings = self._rust.encode_batch(pieces, add_special_tokens=False)
        sizes = []
        for text, piece, encoding in zip(texts, pieces, encodings, strict=True):
            while len(piece) > 1 and self._control.are_in(encoding.ids):  # cut in halves, as when it is encoded
                piece = piece[: len(piece) // 2]
                encoding = self._rust.encode(piece, add_special_tokens=False)
            sizes.append(len((text[: encoding.offsets[0][1]] if encoding.offsets else text).encode()))
        return sizes

    def load_fast(self) -> FastEncoder:
        """The fast encoder for this tokenizer. Raises BackendUnavailableError."""
        if self._rust is None:
            raise BackendUnavailableError("cannot use this tokenizer: it is written in Python")
        return shared_encoder(self.digest, self._rust.to_str)

    def added_tokens(self) -> list[str]:
        """Spellings of all tokens that were added to the vocabulary, special or not."""
        return [] if self._rust is None else [str(token) for token in self._rust.get_added_tokens_decoder().values()]

    def _encode_whole(self, texts: list[str]) -> FlatIds:
        if self.fast is None:
            return self._encode(texts)
        try:
            return self.fast(texts)
        except (ValueError, RuntimeError):
            # The regular expressions of `fastokens` have limits that those of `tokenizers` lack; the ids are the same.
            return self._encode(texts)


def _private_copy(backend: Any) -> Any:
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    # None of these affect the ids of text encoded without special tokens, so the digest does not include them.
    copy.no_truncation()
    copy.no_padding()
    copy.post_processor = None
    copy.decoder = None
    return copy


def _rust_encoder(copy: Any) -> Encode:
    copy.encode_special_tokens = True  # `to_str` does not include this setting

    def encode(texts: list[str]) -> FlatIds:
        return to_flat([encoding.ids for encoding in copy.encode_batch_fast(texts, add_special_tokens=False)])

    return encode


def _python_encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Encoding function for a tokenizer written in Python. It holds the GIL, so more threads neither help nor hurt."""

    def encode(texts: list[str]) -> FlatIds:
        return to_flat([tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts])

    return encode


def _python_digests(tokenizer: PreTrainedTokenizerBase, encode: Encode) -> tuple[str, str]:
    """Two digests of a tokenizer written in Python: over class and vocabulary, and over these, the files it saves
    (merges, a SentencePiece model) and the ids of `_PROBES`, which tell of settings such as lower case."""
    described: list[Any] = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    earlier = hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.suppress(NotImplementedError, OSError, *_NOT_ENCODABLE):  # not all have a method that works
            tokenizer.save_vocabulary(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        described += [[path.name, hashlib.blake2b(path.read_bytes()).hexdigest()] for path in files]
    for text in _PROBES:
        with contextlib.suppress(*_NOT_ENCODABLE):
            described.append(to_lists(encode([text])))
    return earlier, hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest()


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens, except the unknown token, which represents any text outside the vocabulary."""
    special = _special_tokens(tokenizer)
    return {token: index for token, index in special.items() if token and index != tokenizer.unk_token_id}


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Documents to be encoded: `rows` (int64 [N], row numbers within the unit) and their `texts`."""

    epoch: int
    unit: int
    rows: npt.NDArray[np.int64]
    texts: pa.LargeStringArray


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Encoded documents: `tokens` (int32 [T]); document i ends before token `ends[i]` (int64 [N])."""

    epoch: int
    unit: int
    rows: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int64]


class EncoderPool:
    """Encodes row batches on threads.

    Threads suffice because the Rust encoder releases the GIL while it works.
    """

    def __init__(self, encoder: Encoder, boundaries: BoundaryTokens | None, workers: int) -> None:
        self._encoder = encoder
        self._boundaries = boundaries
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tokenizer")

    def submit(self, batch: RowBatch) -> Future[EncodedRows]:
        """Queue a batch for encoding on one of the threads."""
        return self._pool.submit(self._encode, batch)

    def close(self) -> None:
        """Cancel batches that have not started and wait for those being encoded (milliseconds)."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _encode(self, batch: RowBatch) -> EncodedRows:
        tokens, ends = flatten(self._encoder.flat(batch.texts.to_pylist()), self._boundaries)
        return EncodedRows(batch.epoch, batch.unit, batch.rows, tokens, ends)
