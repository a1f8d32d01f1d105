"""Reading what the client of Weights & Biases writes offline, with its own messages, and a store in a folder.

The file is a LevelDB log behind a header of seven bytes: blocks of 32 KiB, each record with a CRC, a length and a type.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from forked_commands import PATIENCE

BLOCK, HEADER = 32 * 1024, 7


def records(file: Path) -> Iterator[Any]:
    """The records of a `.wandb` file that are there, in order."""
    # Made of whatever protobuf is installed: nothing the checker could know.
    messages: Any = import_module("wandb.proto.wandb_internal_pb2")

    content = file.read_bytes()
    assert content.startswith(b":W&B")
    at, parts = HEADER, b""
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block is too small for another record
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + HEADER])
        if at + HEADER + length > len(content):  # it is being written
            return
        parts += content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            record = messages.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def offline_runs(directory: Path) -> list[Path]:
    """The `.wandb` files of a run's folder, in the order of their starts."""
    return sorted(directory.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)


def history(file: Path) -> list[dict[str, Any]]:
    """The rows that were logged in a run that is over.

    The client's own process ends the file, on a busy machine after `finish` has returned.
    """
    deadline = time.monotonic() + PATIENCE
    while "exit" not in [record.WhichOneof("record_type") for record in records(file)]:
        assert time.monotonic() < deadline, f"{file} has no end"
        time.sleep(0.05)
    found = []
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


class Store:
    """What the client does with artifacts, in a folder: `run` logs them, `api` finds and downloads them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.run: Any = SimpleNamespace(
            id="1a2b3c4d",
            url="https://example.invalid/run",
            offline=False,
            disabled=False,
            config=SimpleNamespace(update=lambda *_: None),
            define_metric=lambda *_, **__: None,
            log=self.rows.append,
            log_artifact=self._log,
            finish=lambda exit_code: None,
        )
        self.api: Any = SimpleNamespace(artifact=self._find)

    @property
    def logged(self) -> list[dict[str, Any]]:
        """The artifacts that are confirmed, in their order."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("v*.json"))]

    def _log(self, artifact: Any, aliases: list[str]) -> Any:
        version = f"v{len(self.logged)}"
        entry = {"name": artifact.name, "aliases": [*aliases, version], "metadata": artifact.metadata}

        def wait() -> None:
            for name, file in artifact.manifest.entries.items():
                target = self.folder / version / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.local_path, target)
            (self.folder / f"{version}.json").write_text(json.dumps(entry))

        return SimpleNamespace(wait=wait, qualified_name=f"me/demo/{artifact.name}:{version}")

    def _find(self, name: str) -> Any:
        place, _, alias = name.rpartition(":")
        versions = [
            number
            for number, entry in enumerate(self.logged)
            if f"me/demo/{entry['name']}" == place and alias in entry["aliases"]
        ]
        if not versions:
            raise ValueError(f"artifact '{name}' not found")
        folder = self.folder / f"v{versions[-1]}"
        return SimpleNamespace(version=folder.name, download=lambda root, skip_cache: shutil.copytree(folder, root))


def store_instead_of_the_client() -> None:
    """Before a command: the client's run and artifacts are those of a store in the folder that STORE names."""
    import wandb

    store = Store(Path(os.environ["STORE"]))
    vars(wandb).update(init=lambda **_: store.run, Api=lambda: store.api)
