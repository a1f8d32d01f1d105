"""Two ways of packing a corpus compared: how many documents they cut, and how much padding they add.

    python benchmarks/packing.py

1. The documents' token counts are read from the shards' column `token_count`, and the boundary tokens are added.
2. concat: documents are concatenated and cut every `block_size` tokens; a run drops an incomplete last block.
3. best-fit: the documents of a row group are packed into bins of `block_size + 1` (`colonnade/data/best_fit.py`); also
   the documents of all row groups at once, which shows what a larger window would gain.
"""

from __future__ import annotations

import glob
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.flag_checks import require_at_least_one
from colonnade.data.best_fit import best_fit_bins
from colonnade.data.sample_corpus import build_sample_corpus
from colonnade.errors import UsageError
from colonnade.flags import OneLineParser
from colonnade.runtime.launch import launch

BOUNDARY_TOKENS = 2  # one before and one after each document
SAMPLE = Path("data/sample")  # built if it is missing


def main() -> None:
    parser = OneLineParser(description="Documents cut, and padding, by concat and by best-fit packing.")
    parser.add_argument("--data", metavar="GLOB", help="shards with a token_count column (the sample corpus)")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096], metavar="N")
    given = parser.parse_args()
    for size in given.block_sizes:
        require_at_least_one("--block-sizes", size)
    units = read_lengths(given.data or build_sample_corpus(SAMPLE).train_glob)
    if not units:
        raise UsageError(f"--data {given.data} names no file with rows; give a glob of Parquet shards")
    lengths = np.concatenate(units)
    print(
        f"{len(lengths)} documents in {len(units)} row groups, {lengths.sum()} tokens, {np.median(lengths):.0f} median"
    )
    print("block size  documents longer  cut by concat  cut by best-fit  padding by row group  padding over all")
    for block in given.block_sizes:
        concat = cut_by_concat(lengths, block)
        rows = [best_fit_bins(unit, block + 1) for unit in units]
        cut = sum(cut_by_best_fit(bins) for bins in rows)
        padding = padded(lengths, sum(map(len, rows)), block + 1)
        padding_over_all = padded(lengths, len(best_fit_bins(lengths, block + 1)), block + 1)
        shares = [value / len(lengths) for value in ((lengths > block + 1).sum(), concat, cut)]
        print(f"{block:10d}{shares[0]:18.1%}{shares[1]:15.1%}{shares[2]:17.1%}{padding:22.2%}{padding_over_all:18.2%}")


def read_lengths(pattern: str) -> list[Any]:
    """The token count of each document, one array per row group."""
    units = []
    for path in sorted(glob.glob(pattern)):
        with parquet.ParquetFile(path) as file:
            if "token_count" not in file.schema_arrow.names:
                raise UsageError(f"{path} has no column token_count, which the documents' lengths are read from")
            for number in range(file.num_row_groups):
                column = file.read_row_group(number, columns=["token_count"]).column(0)
                units.append(column.to_numpy().astype(np.int64) + BOUNDARY_TOKENS)
    return units


def cut_by_concat(lengths: Any, block: int) -> int:
    """Number of documents that lie in more than one block of the stream."""
    ends = np.cumsum(lengths)
    return int(((ends - lengths) // block != (ends - 1) // block).sum())


def cut_by_best_fit(bins: list[Any]) -> int:
    return int((np.bincount(np.concatenate(bins)[:, 0]) > 1).sum())


def padded(lengths: Any, bins: int, capacity: int) -> float:
    """The fraction of the bins' capacity that holds no token."""
    return float(1 - lengths.sum() / (bins * capacity))


if __name__ == "__main__":
    launch(main)
