"""Speed of the data pipeline, from Parquet files to packed blocks of token ids, compared with other ways.

    python benchmarks/data.py
    python benchmarks/data.py --json data.json --size-mb 20 --rounds 5

1. Make a corpus from text on this machine: source code and documentation, each file once, in a seeded order.
2. Train a byte-level BPE tokenizer of 32,768 entries on the beginning of it. Both are kept in --work.
3. Run the contenders in turns, each in a new process; a ratio is the median of the rounds' ratios.

The contenders:
    ours_hf      `streaming_token_generator` with its defaults and block size 4096, encoding with `tokenizers`
    ours_fast    the same with `fastokens`; the check that its ids are the same has run before, as in any later run
    encoder      `tokenizers.encode_batch_fast` alone, over texts in memory, without reading the ids
    datasets     `datasets` streaming, with the tokenizer and then `group_texts` mapped over batches

CPU seconds are summed over all threads. The clock starts after imports and after loading a tokenizer; ours then makes
its own encoder from it within the measured time, once per run. Every contender may use all cores that this process may
use (--cores: fewer).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from colonnade.errors import UsageError  # noqa: E402  (needs the path)
from colonnade.files import require_place  # noqa: E402
from colonnade.flags import OneLineParser  # noqa: E402
from colonnade.runtime.launch import launch  # noqa: E402

BLOCK_SIZE, VOCABULARY = 4096, 32_768
ROWS_A_GROUP, SHARDS, TRAINING_MB = 1000, 4, 20
DATASETS_BATCH = 1000  # the default of `map`
SUFFIXES = {
    ".py",
    ".pyi",
    ".txt",
    ".md",
    ".rst",
    ".c",
    ".h",
    ".hpp",
    ".cpp",
    ".js",
    ".css",
    ".html",
    ".pm",
    ".pl",
    ".tex",
}
MIN_BYTES, MAX_BYTES = 100, 200_000
# Files are taken from all of these in turn. The last one contains some of the others; duplicate files are skipped.
SOURCES = (
    "/usr/share/doc",
    "/usr/share/man",
    "/usr/include",
    "/usr/lib/python3",
    "/usr/share/perl",
    "/usr/src",
    "/usr/share",
)


class Measured(NamedTuple):
    """One run: CPU and wall-clock seconds, tokens of the rows that were kept, tokens delivered."""

    cpu: float
    wall: float
    kept: int
    delivered: int

    @property
    def cpu_per_million(self) -> float:
        return self.cpu / self.kept * 1e6

    @property
    def rate(self) -> float:
        return self.delivered / self.wall


def main() -> None:
    parser = OneLineParser(description="CPU seconds a million tokens, and tokens a second, of the data plane.")
    parser.add_argument("--json", metavar="PATH", help='write {"ratios": {name: value}} to this file')
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each contender (3)")
    parser.add_argument("--size-mb", type=int, default=100, metavar="MB", help="text in the corpus, at least (100)")
    parser.add_argument("--cores", type=int, metavar="N", help="cores every contender may use (default all of ours)")
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "benchmark-data",
        metavar="FOLDER",
        help="for corpus and tokenizer (build/benchmark-data)",
    )
    parser.add_argument("--contender", choices=CONTENDERS, help="measure this one once, in this process")
    given = parser.parse_args()
    require_place("--json", given.json)
    if given.contender:
        print(json.dumps(CONTENDERS[given.contender](given.work)))
        return
    if min(given.rounds, given.size_mb, given.cores or 1) < 1:
        parser.error("--rounds, --size-mb and --cores must be at least 1")
    try:
        rounds = measure(given.work / f"{given.size_mb}-mb", given.size_mb, given.rounds, given.cores)
    except UsageError as error:
        parser.error(str(error))
    ratios = ratios_of(rounds)
    report(rounds, ratios)
    if given.json:
        Path(given.json).write_text(json.dumps({"ratios": ratios}, indent=2) + "\n")


def measure(work: Path, size_mb: int, rounds: int, cores: int | None) -> list[dict[str, Measured]]:
    """Run all contenders in turns; each round begins with a different one."""
    os.environ.update(XDG_CACHE_HOME=str(work / "cache"), HF_HOME=str(work / "cache"), HF_HUB_OFFLINE="1")
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    prepare(work, size_mb)
    names = list(CONTENDERS)
    found = []
    for number in range(rounds):
        turn = number % len(names)
        found.append({name: run(name, work) for name in names[turn:] + names[:turn]})
    return found


def run(name: str, work: Path) -> Measured:
    command = [sys.executable, __file__, "--contender", name, "--work", str(work)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Measured(*json.loads(done.stdout.splitlines()[-1]))


def ratios_of(rounds: list[dict[str, Measured]]) -> dict[str, float]:
    def median(ratio: Callable[[dict[str, Measured]], float]) -> float:
        return statistics.median(map(ratio, rounds))

    return {
        "ours_hf_cpu_over_encoder": median(lambda r: r["ours_hf"].cpu_per_million / r["encoder"].cpu_per_million),
        "ours_fast_cpu_over_encoder": median(lambda r: r["ours_fast"].cpu_per_million / r["encoder"].cpu_per_million),
        "ours_fast_tokens_per_second_over_datasets": median(lambda r: r["ours_fast"].rate / r["datasets"].rate),
        "delivered_fraction": min(
            r[name].delivered / r["encoder"].kept for r in rounds for name in ("ours_hf", "ours_fast")
        ),
    }


def report(rounds: list[dict[str, Measured]], ratios: dict[str, float]) -> None:
    kept = rounds[0]["encoder"].kept
    print(f"{kept:,} tokens, {len(os.sched_getaffinity(0))} cores, median of {len(rounds)} rounds")
    print(f"{'':12}{'CPU s/Mtok':>12}{'tokens/s':>14}{'delivered':>12}")
    for name in CONTENDERS:
        runs = [found[name] for found in rounds]
        cpu, rate = (statistics.median(getattr(run, value) for run in runs) for value in ("cpu_per_million", "rate"))
        print(f"{name:12}{cpu:12.4f}{rate:14,.0f}{runs[0].delivered / kept:12.2%}")
    for name, ratio in ratios.items():
        print(f"{name}  {ratio:.4f}")


# --- corpus and tokenizer --------------------------------------------------------------------------------------------


def prepare(work: Path, size_mb: int) -> None:
    """Make corpus and tokenizer once, and check that both backends give the same ids; that answer is stored, too."""
    from colonnade.data.tokenizer_backend import open_encoder

    marker = work / "complete"
    if not marker.exists():
        work.mkdir(parents=True, exist_ok=True)
        texts = collect_texts(size_mb)
        write_shards(work, texts)
        train_tokenizer(work, texts)
        marker.touch()
    _, backend = open_encoder(load(work), "fastokens")
    print(f"{work}: at least {size_mb} MB; {backend}", flush=True)


def collect_texts(size_mb: int) -> list[str]:
    """The contents of distinct text files until they amount to `size_mb` million bytes, in a seeded order."""
    texts: list[str] = []
    seen: set[bytes] = set()
    size = 0
    for text in text_files():
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if digest in seen:
            continue
        seen.add(digest)
        texts.append(text)
        size += len(text.encode())
        if size >= size_mb * 1_000_000:
            random.Random(0).shuffle(texts)
            print(f"corpus: {size / 1e6:.0f} MB in {len(texts):,} documents", flush=True)
            return texts
    raise UsageError(
        f"--size-mb {size_mb}: this machine holds {size / 1e6:.0f} MB of text in {', '.join(SOURCES)} and Python's "
        "folders; give less, or install packages with documentation"
    )


def text_files() -> Iterator[str]:
    """Texts from the folders where a machine keeps them, taking one file from each folder in turn."""
    places = [walk(Path(place)) for place in (*(sysconfig.get_path(name) for name in ("stdlib", "purelib")), *SOURCES)]
    while places:
        for place in [*places]:
            text = next(place, None)
            if text is None:
                places.remove(place)
            else:
                yield text


def walk(place: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(place):
        folders.sort()
        for name in sorted(files):
            text = read_text(Path(folder) / name)
            if text is not None:
                yield text


def read_text(path: Path) -> str | None:
    """The text of a file, decompressed; None if it is not text or its size is outside the limits."""
    is_manual = path.suffix == ".gz" or path.parent.name.startswith("man") or path.name == "copyright"
    if not (is_manual or path.suffix in SUFFIXES) or path.is_symlink():
        return None
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return None
    return text if MIN_BYTES <= len(text) <= MAX_BYTES and "\0" not in text else None


def write_shards(work: Path, texts: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for index in range(SHARDS):
        begin, end = (len(texts) * part // SHARDS for part in (index, index + 1))
        table = pa.table({"text": pa.array(texts[begin:end], pa.large_string())})
        pq.write_table(table, work / f"shard_{index}.parquet", row_group_size=ROWS_A_GROUP)


def train_tokenizer(work: Path, texts: list[str]) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    part = texts[: max(1, len(texts) * TRAINING_MB * 1_000_000 // max(1, sum(map(len, texts))))]
    tokenizer.train_from_iterator(part, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(work / "tokenizer")


def load(work: Path) -> Any:
    from data_processing import load_tokenizer

    return load_tokenizer(str(work / "tokenizer"))


def shards(work: Path) -> list[str]:
    return sorted(str(path) for path in work.glob("shard_*.parquet"))


# --- contenders ------------------------------------------------------------------------------------------------------


class Clock:
    """Measures CPU seconds of this process and its children, and wall-clock seconds, since it was created."""

    def __init__(self) -> None:
        self._cpu, self._wall = self._cpu_now(), time.perf_counter()

    @staticmethod
    def _cpu_now() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    def measured(self, kept: int, delivered: int) -> Measured:
        return Measured(self._cpu_now() - self._cpu, time.perf_counter() - self._wall, kept, delivered)


def ours(work: Path, backend: str) -> Measured:
    import pyarrow.compute
    import pyarrow.parquet  # noqa: F401  (otherwise imported by the first use, within the measured time)

    from data_processing import streaming_token_generator

    tokenizer, paths = load(work), shards(work)
    clock = Clock()
    with streaming_token_generator(paths, tokenizer, block_size=BLOCK_SIZE, epochs=1, backend=backend) as stream:
        delivered = sum(len(chunk.tokens) - 1 for chunk in stream)
        return clock.measured(delivered, delivered)


def encoder_alone(work: Path) -> Measured:
    from tokenizers import Tokenizer

    from colonnade.data.shards import Units, open_shards
    from colonnade.data.tokenizer_backend import read_first_rows

    tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    texts = list(read_first_rows(Units(open_shards([Path(path) for path in shards(work)], "text")), "text"))
    tokens = 0
    clock = Clock()
    for begin in range(0, len(texts), ROWS_A_GROUP):
        batch = tokenizer.encode_batch_fast(texts[begin : begin + ROWS_A_GROUP], add_special_tokens=False)
        tokens += sum(map(len, batch))
    return clock.measured(tokens, tokens)


def with_datasets(work: Path) -> Measured:
    import datasets

    tokenizer = load(work)
    kept = 0

    def tokenize(rows: dict[str, list[str]]) -> Any:
        nonlocal kept
        found = tokenizer(rows["text"])
        kept += sum(map(len, found["input_ids"]))
        return found

    def group_texts(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        joined: dict[str, list[int]] = {}
        for name, lists in rows.items():
            joined[name] = []
            for ids in lists:
                joined[name].extend(ids)
        whole = len(joined["input_ids"]) // BLOCK_SIZE * BLOCK_SIZE
        blocks = {
            name: [ids[begin : begin + BLOCK_SIZE] for begin in range(0, whole, BLOCK_SIZE)]
            for name, ids in joined.items()
        }
        blocks["labels"] = [list(ids) for ids in blocks["input_ids"]]
        return blocks

    stream = datasets.load_dataset("parquet", data_files=shards(work), split="train", streaming=True)
    clock = Clock()
    stream = stream.map(tokenize, batched=True, batch_size=DATASETS_BATCH, remove_columns=["text"])
    stream = stream.map(group_texts, batched=True, batch_size=DATASETS_BATCH)
    delivered = sum(len(row["input_ids"]) for row in stream)
    return clock.measured(kept, delivered)


CONTENDERS: dict[str, Callable[[Path], Measured]] = {
    "ours_hf": lambda work: ours(work, "hf"),
    "ours_fast": lambda work: ours(work, "fastokens"),
    "encoder": encoder_alone,
    "datasets": with_datasets,
}


if __name__ == "__main__":
    launch(main)
