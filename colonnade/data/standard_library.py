"""The Python standard library as text: its modules, a train/validation split, and documents of bounded length.

The result depends only on the modules' relative paths and contents, not on where the library is installed.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from colonnade.errors import UsageError

MAX_DOCUMENT_CHARS = 16_384
MAX_CORPUS_BYTES = 15_000_000
VALIDATION_ONE_IN = 20

# Tests contain deliberately broken files. `encodings` consists of tables of character codes. `pydoc_data` is one
# generated module of 0.8 MB: whichever side of the split got it, the other would have nothing similar. The other
# folders are not part of the library.
EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "encodings", "pydoc_data"}
    | {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}
)
# Generated when Python was built or packaged, with paths of that machine.
EXCLUDED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class Module:
    """One source file: its path relative to the standard library, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.path.encode()).digest()


def standard_library() -> Path:
    """The standard-library folder of the running Python. It does not exist if Python keeps its library in a zip."""
    return Path(sysconfig.get_path("stdlib"))


def read_modules(root: Path, max_files: int | None = None) -> list[Module]:
    """Read the modules under `root` in the order of their paths' hashes, up to `max_files` and 15 MB.

    This order mixes the packages and does not depend on the location of `root`. Files that are empty or do not decode
    (PEP 263) are left out. Raises UsageError if fewer than two modules are found.
    """
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_FOLDERS]
        paths += [
            Path(folder, name).relative_to(root).as_posix()
            for name in names
            if name.endswith(".py") and not name.startswith(EXCLUDED_PREFIXES)
        ]
    modules: list[Module] = []
    size = 0
    for module in sorted((Module(path, "") for path in paths), key=lambda module: module.digest):
        if len(modules) == max_files:
            break
        text = _read_source(root / module.path)
        if not text.strip():
            continue
        size += len(text.encode())
        if size > MAX_CORPUS_BYTES:
            break
        modules.append(Module(module.path, text))
    if len(modules) < 2:
        raise UsageError(
            f"this Python has no standard-library source ({len(modules)} readable .py files in {root}): "
            "use a Python that has, or give --data-glob and --tokenizer-path"
        )
    return modules


def _read_source(path: Path) -> str:
    """The file's text, decoded with the encoding it declares, or an empty string if that fails."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        text.encode("utf-8")
    except (SyntaxError, UnicodeError, OSError):
        return ""
    return text


def split_modules(modules: Sequence[Module]) -> tuple[list[Module], list[Module]]:
    """Split into (train, validation) by the hash of the path; with two or more modules, neither is empty."""
    # Not the leading bytes of the hash, which already determine the order.
    held_out = [int.from_bytes(module.digest[8:16], "big") % VALIDATION_ONE_IN == 0 for module in modules]
    if all(held_out) or not any(held_out):
        held_out = [False] * (len(modules) - 1) + [True]
    train = [module for module, held in zip(modules, held_out, strict=True) if not held]
    validation = [module for module, held in zip(modules, held_out, strict=True) if held]
    return train, validation


def cut_text(text: str, max_chars: int = MAX_DOCUMENT_CHARS) -> list[str]:
    """Cut `text` into pieces of at most `max_chars` whose concatenation is `text`.

    A cut is made before the last line in reach that starts a class, a function or a decorator at top level; if there is
    none, before the last line; else at `max_chars`.
    """
    pieces: list[str] = []
    start = 0
    while len(text) - start > max_chars:
        # Looking back at most half a piece prevents very short pieces.
        earliest, end = start + max_chars // 2, start + max_chars
        cuts = [text.rfind(f"\n{opening}", earliest, end) for opening in ("class ", "def ", "async def ", "@")]
        cut = max(cuts)
        if cut < 0:
            cut = text.rfind("\n", earliest, end)
        cut = end if cut < 0 else cut + 1
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]
