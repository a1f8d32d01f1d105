"""Shards of token ids: which are read, and what is refused."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from colonnade.data.formats import tokens
from colonnade.data.shards import Shard, UnitReader, open_shards
from colonnade.errors import UsageError


def opened(path: Path) -> Shard:
    (shard,) = open_shards([path], "text")
    return shard


def llm_c(ids: np.ndarray, magic: int, version: int, count: int | None = None) -> bytes:
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + ids.tobytes()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.npy", "u2"),
        ("a.npy", "u4"),
        ("a.npy", "i4"),
        ("train.bin", "u2"),
        ("train.uint32.bin", "u4"),
        ("train.u32.bin", "u4"),
        ("gpt2.bin", "header u2"),
        ("llama3.bin", "header u4"),
    ],
)
def test_token_shards(tmp_path: Path, name: str, kind: str) -> None:
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 50_000, tokens.UNIT_TOKENS + 1000).astype(kind[-2:])
    path = tmp_path / name
    if kind.startswith("header"):
        path.write_bytes(llm_c(ids, *{"u2": (20240520, 1), "u4": (20240801, 7)}[kind[-2:]]))
    elif name.endswith(".npy"):
        np.save(path, ids)
    else:
        ids.tofile(path)
    shard, reader = opened(path), UnitReader("text")
    assert (shard.layout, shard.rows, shard.units) == ("tokens", 2, 2)
    windows = [list(reader.windows(shard, number)) for number in (1, 0)][::-1]
    assert [[window.shape for window in unit] for unit in windows] == [[(tokens.UNIT_TOKENS,)], [(1000,)]]
    read = np.concatenate([unit[0] for unit in windows])
    assert read.dtype == np.dtype(f"u{ids.dtype.itemsize}")
    assert np.array_equal(read, ids)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"", "0 tokens"),
        ("a.bin", b"abc", "3 bytes are no whole number of 2-byte ids"),
        ("a.uint32.bin", b"abcdef", "no whole number of 4-byte ids"),
        ("a.bin", llm_c(np.zeros(5, np.uint16), 20240520, 1, count=6), "1034 bytes where 6 tokens"),
        ("a.bin", llm_c(np.zeros(5, np.uint16), 20240520, 9), "header of version 9"),
        ("a.npy", b"no numpy", "no numpy file"),
        ("a.npy", b"\x93NUMPY\x01\x00\xff", "cannot be read"),
    ],
)
def test_files_that_are_no_token_shards_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"{name} .*{message}"):
        open_shards([tmp_path / name], "text")


@pytest.mark.parametrize("array", [np.zeros((2, 3), np.uint16), np.zeros(3, np.int64), np.zeros(3, ">u2"), np.zeros(3)])
def test_arrays_that_are_no_tokens_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UsageError, match="one dimension of uint16, uint32 or int32"):
        open_shards([tmp_path / "a.npy"], "text")


def test_no_flipped_bit_in_a_numpy_header_is_a_traceback(tmp_path: Path) -> None:
    ids = np.arange(100, dtype=np.uint16)
    np.save(tmp_path / "a.npy", ids)
    whole = (tmp_path / "a.npy").read_bytes()
    refused: list[str] = []
    for bit in range(8 * 6, 8 * 70):  # the rest of the header is spaces
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a.npy").write_bytes(bytes(flipped))
        try:
            opened(tmp_path / "a.npy")
        except UsageError as error:
            refused.append(str(error))
    assert len(refused) > 480
    assert all(re.fullmatch(r"data shard .*a\.npy .*", line) for line in refused)


def test_a_truncated_numpy_file_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(1000, np.uint16))
    os.truncate(tmp_path / "a.npy", 500)
    with pytest.raises(UsageError, match="500 bytes where 1000 tokens"):
        open_shards([tmp_path / "a.npy"], "text")


def test_token_ids_are_little_endian(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(struct.pack("<3H", 1, 258, 50_256))
    (window,) = UnitReader("text").windows(opened(tmp_path / "a.bin"), 0)
    assert window.tolist() == [1, 258, 50_256]


def test_uint32_ids_that_would_be_read_as_uint16_are_noticed(tmp_path: Path) -> None:
    np.arange(1, 5000, dtype="<u4").tofile(tmp_path / "a.bin")
    with pytest.raises(UsageError, match=r"rename it to \.u32\.bin"):
        open_shards([tmp_path / "a.bin"], "text")
    (tmp_path / "a.bin").rename(tmp_path / "a.u32.bin")
    assert open_shards([tmp_path / "a.u32.bin"], "text")[0].dtype == "<u4"
