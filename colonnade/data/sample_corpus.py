"""A corpus that every machine has: the source of the Python standard library, as Parquet shards with a tokenizer.

    python -m colonnade.data.sample_corpus --output data/sample

1. read      the modules under the interpreter's standard-library path (no tests, no installed packages)
2. split     by the hash of a module's path: about one module in twenty is held out
3. tokenizer byte-level BPE, trained on the training split only, saved for `transformers.AutoTokenizer`
4. shards    `train-*.parquet`, `validation-*.parquet` with FineWeb's columns and true token counts

The result depends only on the modules, not on their location or on who builds it. It is built in a temporary folder
and renamed, so a folder that exists is complete; a second call returns it at once.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import json
import platform
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colonnade.data.standard_library import Module, cut_text, read_modules, split_modules, standard_library
from colonnade.errors import ColonnadeError, RunError, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MANIFEST_NAME = "sample_corpus.json"
FORMAT_VERSION = 1
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
DEFAULT_VOCAB_SIZE = 4096
# The special tokens and one token per byte value: a smaller byte-level vocabulary cannot encode every text.
MIN_VOCAB_SIZE = 3 + 256

# With documents of about 10 kB, roughly a megabyte per row group.
ROWS_PER_GROUP = 128
TRAIN_SHARDS = 4
VALIDATION_SHARDS = 1


@dataclass(frozen=True)
class SampleCorpus:
    """A complete sample corpus on disk. The globs are escaped, ready for `glob.glob`; counts are in tokens."""

    train_glob: str
    validation_glob: str
    tokenizer_path: str
    train_tokens: int
    validation_tokens: int


def _print_at_once(line: str) -> None:
    print(line, flush=True)


def build_sample_corpus(
    output: str | Path,
    *,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    max_files: int | None = None,
    report: Callable[[str], None] = _print_at_once,
) -> SampleCorpus:
    """Return the sample corpus in the folder `output`; build it if it is not there yet.

    `max_files` limits the number of modules (None: up to 15 MB). `report` receives one line per stage. Several
    processes may call this for the same folder at the same time: one builds, the others wait and reuse the result.

    Raises UsageError if the sizes are too small, if `output` holds something else, or if this Python comes without its
    library's source; RunError if the folder cannot be written.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UsageError(
            f"vocab size {vocab_size} is below {MIN_VOCAB_SIZE} (256 bytes and 3 special tokens): give a larger one"
        )
    if max_files is not None and max_files < 2:
        raise UsageError(f"max files {max_files} is below 2 (one module a split): give at least 2")
    output = Path(output)
    settings = {"vocab_size": vocab_size, "max_files": max_files}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _one_builder(output):
            if not _is_complete(output, settings):
                _build_aside(output, settings, report)
                return _open_corpus(output)
    except OSError as error:
        raise RunError(f"cannot write the sample corpus to {output}: {error.strerror or error}") from error
    corpus = _open_corpus(output)
    report(f"sample corpus: {output} is complete and used again ({_token_counts(corpus)})")
    return corpus


def _is_complete(output: Path, settings: dict[str, int | None]) -> bool:
    """Whether `output` holds exactly this corpus. Anything else there is left alone and raises UsageError."""
    if not output.is_dir():
        if output.exists():
            raise UsageError(f"{output} is a file, not a folder: give another output folder")
        return False
    manifest_path = output / MANIFEST_NAME
    if not manifest_path.is_file():
        if any(output.iterdir()):
            raise UsageError(f"{output} is not empty and holds no sample corpus: give another output folder")
        return False
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{manifest_path} is damaged ({error}): remove {output}, or give another output folder"
        ) from error
    for name, value in {"format_version": FORMAT_VERSION, **settings}.items():
        if manifest.get(name) != value:
            raise UsageError(
                f"{output} holds a sample corpus of {name} {manifest.get(name)}, not {value}: "
                "remove it or give another output folder"
            )
    return True


def _open_corpus(output: Path) -> SampleCorpus:
    manifest = json.loads((output / MANIFEST_NAME).read_text(encoding="utf-8"))
    root = Path(glob.escape(str(output)))
    return SampleCorpus(
        train_glob=str(root / "train-*.parquet"),
        validation_glob=str(root / "validation-*.parquet"),
        tokenizer_path=str(output / "tokenizer"),
        train_tokens=manifest["train_tokens"],
        validation_tokens=manifest["validation_tokens"],
    )


def _token_counts(corpus: SampleCorpus) -> str:
    return f"{corpus.train_tokens / 1e6:.2f} M tokens to train on, {corpus.validation_tokens / 1e6:.2f} M held out"


@contextlib.contextmanager
def _one_builder(output: Path) -> Iterator[None]:
    """Let one process at a time work on `output`. The lock is released when its holder exits, in whatever way."""
    import fcntl

    with open(output.parent / f".{output.name}.lock", "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            # Some network file systems have no locks. There, the rename still lets only one builder succeed.
            yield
            return
        # Left by a killed builder: while this process holds the lock, nobody else is working on it.
        for leftover in output.parent.glob(f"{glob.escape(_aside_prefix(output))}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def _aside_prefix(output: Path) -> str:
    return f".{output.name}.building-"


def _build_aside(output: Path, settings: dict[str, int | None], report: Callable[[str], None]) -> None:
    aside = Path(tempfile.mkdtemp(prefix=_aside_prefix(output), dir=output.parent))
    aside.chmod(0o755)
    try:
        _build(aside, output, settings, report)
        try:
            aside.rename(output)
        except OSError:
            # Without a lock, another process may have finished first; its corpus is the same.
            if not _is_complete(output, settings):
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _build(folder: Path, shown_as: Path, settings: dict[str, int | None], report: Callable[[str], None]) -> None:
    """Write the whole corpus into `folder`; the reported lines name `shown_as`, its final location."""
    modules = read_modules(standard_library(), settings["max_files"])
    train, validation = split_modules(modules)
    size = sum(len(module.text.encode()) for module in modules)
    report(
        f"corpus: {len(modules)} modules of Python {platform.python_version()}'s standard library, "
        f"{size / 1e6:.1f} MB, {len(validation)} of them held out for validation"
    )
    vocab_size = settings["vocab_size"] or DEFAULT_VOCAB_SIZE
    tokenizer = train_tokenizer((module.text for module in train), vocab_size)
    save_tokenizer(tokenizer, folder / "tokenizer")
    report(f"tokenizer: byte-level BPE of {tokenizer.get_vocab_size():,} tokens -> {shown_as / 'tokenizer'}")
    counts = {}
    for split, part, shards in (("train", train, TRAIN_SHARDS), ("validation", validation, VALIDATION_SHARDS)):
        rows = list(_rows(part, tokenizer))
        counts[f"{split}_tokens"] = sum(row["token_count"] for row in rows)
        written = _write_shards(rows, folder, split, shards)
        report(
            f"{split}: {len(rows):,} documents, {counts[f'{split}_tokens']:,} tokens "
            f"-> {shown_as / f'{split}-*.parquet'} (shards: {written})"
        )
    manifest = {"format_version": FORMAT_VERSION, **settings, **counts, "python": platform.python_version()}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer (like GPT-2's) whose ids 0, 1, 2 are `<|bos|>`, `<|eos|>`, `<|pad|>`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Save in the format that `transformers.AutoTokenizer.from_pretrained` reads, without importing `transformers`."""
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _rows(modules: Sequence[Module], tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """The documents of one split as rows with FineWeb's columns, in the order of the modules."""
    release = ".".join(platform.python_version_tuple()[:2])
    # Text that spells a special token is encoded as plain text, as in the training stream.
    tokenizer.encode_special_tokens = True
    for module in modules:
        url = f"https://github.com/python/cpython/blob/{release}/Lib/{module.path}"
        pieces = cut_text(module.text)
        encodings = tokenizer.encode_batch_fast(pieces, add_special_tokens=False)
        for number, (piece, encoding) in enumerate(zip(pieces, encodings, strict=True)):
            yield {
                "text": piece,
                "id": f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{url}#{number}')}>",
                "dump": f"python-{platform.python_version()}",
                "url": url,
                "file_path": f"Lib/{module.path}",
                "language": "en",
                "token_count": len(encoding.ids),
            }


def _write_shards(rows: Sequence[dict[str, Any]], folder: Path, split: str, shards: int) -> int:
    """Write `rows` to at most `shards` files of consecutive rows, and return how many were written."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [(name, pa.string()) for name in ("text", "id", "dump", "url", "file_path", "language")]
        + [("token_count", pa.int64())]
    )
    rows_per_shard = -(-len(rows) // shards)
    starts = range(0, len(rows), rows_per_shard)
    for number, start in enumerate(starts):
        pq.write_table(
            pa.Table.from_pylist(list(rows[start : start + rows_per_shard]), schema),
            folder / f"{split}-{number:05d}.parquet",
            row_group_size=ROWS_PER_GROUP,
            compression="zstd",
            use_dictionary=["dump", "url", "file_path", "language"],
            write_page_checksum=True,
        )
    return len(starts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m colonnade.data.sample_corpus",
        description="Write a sample corpus and its tokenizer from the Python standard library's own source.",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for shards and tokenizer")
    parser.add_argument(
        "--vocab-size", type=int, default=DEFAULT_VOCAB_SIZE, help="tokens in the vocabulary (default: %(default)s)"
    )
    parser.add_argument(
        "--max-files", type=int, default=None, help="modules to read at most (default: as many as make 15 MB)"
    )
    arguments = parser.parse_args(argv)
    try:
        build_sample_corpus(arguments.output, vocab_size=arguments.vocab_size, max_files=arguments.max_files)
    except ColonnadeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
