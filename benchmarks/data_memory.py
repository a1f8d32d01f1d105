"""Memory of the shard reader over time: it has to stay flat, at most 64 MiB per lane.

    python benchmarks/data_memory.py
    python benchmarks/data_memory.py --seconds 3600 --lanes 4 --json memory.json

1. Write two Parquet files of random words: one with row groups of 1,000 rows, one with everything in one row group.
2. For each file, in a new process, stream the units repeatedly through one `UnitReader` per lane, each on its own
   thread. Lanes begin at different units.
3. Sample the process's resident memory, and print it over time, with its maximum, relative to a baseline.

The baseline is the memory after the process has imported everything and has read one small file.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flag_checks import require_at_least_one
from colonnade.files import require_place
from colonnade.flags import OneLineParser
from colonnade.runtime.launch import launch

LIMIT_MIB = 64
SAMPLE_SECONDS = 0.005
PRINTED = 12  # lines per file
WAYS = {"groups_of_1000_rows": 1000, "one_giant_group": None}


def main() -> None:
    parser = OneLineParser(description="Resident memory of the shard reader over time.")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="SECONDS", help="for each file (10)")
    parser.add_argument("--lanes", type=int, default=1, metavar="COUNT", help="readers at once, each on a thread (1)")
    parser.add_argument("--megabytes", type=int, default=256, metavar="SIZE", help="text in each file (256)")
    parser.add_argument("--json", metavar="PATH", help='write {"mib_a_lane": {name: value}, ...} to this file')
    parser.add_argument("--measure", nargs=2, metavar="PATH", help=argparse.SUPPRESS)
    given = parser.parse_args()
    require_at_least_one("--lanes", given.lanes)
    require_at_least_one("--megabytes", given.megabytes)
    require_place("--json", given.json)
    if given.measure:
        print(json.dumps(measure(given.measure[0], given.measure[1], given.seconds, given.lanes)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        small = write(Path(folder) / "small.parquet", 1, 1000)
        for name, rows in WAYS.items():
            path = write(Path(folder) / f"{name}.parquet", given.megabytes, rows)
            command = [sys.executable, __file__, "--seconds", str(given.seconds), "--lanes", str(given.lanes)]
            done = subprocess.run([*command, "--measure", path, small], capture_output=True, text=True, check=True)
            results[name] = json.loads(done.stdout)
            show(name, results[name], given.lanes)
    if given.json:
        a_lane = {name: result["above_mib"] / given.lanes for name, result in results.items()}
        Path(given.json).write_text(json.dumps({"mib_a_lane": a_lane, "runs": results}, indent=2) + "\n")


def show(name: str, result: dict[str, Any], lanes: int) -> None:
    print(f"{name}: {result['gigabytes']:.2f} GB in {result['seconds']:.0f} s, {lanes} lanes")
    for seconds, mib in result["samples"]:
        print(f"  {seconds:8.1f} s  {mib:7.1f} MiB above the start")
    print(f"  maximum   {result['above_mib']:7.1f} MiB, {result['above_mib'] / lanes:.1f} a lane (limit {LIMIT_MIB})")


def write(path: Path, megabytes: int, group: int | None) -> str:
    """Write a file with about `megabytes` of text in documents of 200 to 6,000 bytes; return its path."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghijklmnopqrstuvwxyz", k=generator.randint(2, 9))) for _ in range(5000)]
    bases = [" ".join(generator.choices(words, k=generator.randint(30, 1000))) for _ in range(1000)]
    texts: list[str] = []
    size = 0
    while size < megabytes * 1_000_000:
        texts.append(f"{len(texts)} {bases[len(texts) % len(bases)]}")
        size += len(texts[-1])
    table = pa.table({"id": range(len(texts)), "text": texts})
    pq.write_table(table, path, row_group_size=group or len(texts), compression="zstd", write_page_checksum=True)
    return str(path)


def measure(path: str, small: str, seconds: float, lanes: int) -> dict[str, Any]:
    """Stream the units of `path` for `seconds` on `lanes` threads; return the resident memory during that time."""
    import psutil

    from colonnade.data.shards import UnitReader, Units, open_shards

    stream(UnitReader("text"), Units(open_shards([small], "text")), 0, time.monotonic())
    units = Units(open_shards([path], "text"))
    process = psutil.Process()
    begin, start = time.monotonic(), process.memory_info().rss
    done = [0] * lanes

    def lane(number: int) -> None:
        reader = UnitReader("text")
        done[number] = stream(reader, units, number * len(units) // lanes, begin + seconds)
        reader.close()

    threads = [threading.Thread(target=lane, args=(number,), daemon=True) for number in range(lanes)]
    for thread in threads:
        thread.start()
    samples: list[tuple[float, float]] = []
    highest = 0
    while any(thread.is_alive() for thread in threads):
        time.sleep(SAMPLE_SECONDS)
        now, rss = time.monotonic() - begin, process.memory_info().rss - start
        highest = max(highest, rss)
        if now >= len(samples) * seconds / PRINTED:
            samples.append((now, rss / 2**20))
    return {
        "seconds": time.monotonic() - begin,
        "gigabytes": sum(done) / 1e9,
        "above_mib": highest / 2**20,
        "samples": samples,
    }


def stream(reader: Any, units: Any, first: int, until: float) -> int:
    """Read units cyclically from `first` on until `until`, at least one whole; return the bytes of text read."""
    size, ordinal = 0, first
    while True:
        for window in reader.windows(*units.locate(ordinal % len(units))):
            size += window.nbytes
        ordinal += 1
        if time.monotonic() >= until:
            return size


if __name__ == "__main__":
    launch(main)
