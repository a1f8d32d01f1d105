"""The Python standard library as text: its modules, a split of them, and documents of a bounded length.

What comes out depends on the modules' paths and contents alone, not on where the library lies.
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

# Tests hold deliberately broken files. `encodings` is tables of character codes. `pydoc_data` is one generated module
# of 0.8 MB: on whichever side of the split it fell, the other would have nothing like it. The others are not the
# library's.
EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "encodings", "pydoc_data"}
    | {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}
)
# Written when Python was built or packaged, with paths of that machine.
EXCLUDED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class Module:
    """One source file: its path below the standard library, with forward slashes, and its text."""

    path: str
    text: str

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.path.encode()).digest()


def standard_library() -> Path:
    """The folder with the running Python's library; a Python frozen into a zip names one that is not there."""
    return Path(sysconfig.get_path("stdlib"))


def read_modules(root: Path, max_files: int | None = None) -> list[Module]:
    """Read the modules below `root` in the order of their paths' hashes, up to `max_files` and 15 MB.

    That order mixes the packages, and it is the same wherever `root` lies. Files that are empty or that do not decode
    (PEP 263) are left out. Raises UsageError when fewer than two modules are there.
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
    """The file's text in the encoding it declares, or an empty string where that fails."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        text.encode("utf-8")
    except (SyntaxError, UnicodeError, OSError):
        return ""
    return text


def split_modules(modules: Sequence[Module]) -> tuple[list[Module], list[Module]]:
    """Split into (train, validation) by the hash of the path; neither is empty when there are two modules."""
    # Other bytes than the leading ones, which already decide the order.
    held_out = [int.from_bytes(module.digest[8:16], "big") % VALIDATION_ONE_IN == 0 for module in modules]
    if all(held_out) or not any(held_out):
        held_out = [False] * (len(modules) - 1) + [True]
    train = [module for module, held in zip(modules, held_out, strict=True) if not held]
    validation = [module for module, held in zip(modules, held_out, strict=True) if held]
    return train, validation


def cut_text(text: str, max_chars: int = MAX_DOCUMENT_CHARS) -> list[str]:
    """Cut `text` into pieces of at most `max_chars` that join to it again.

    A cut falls before the last line in reach that starts a top-level statement, else before the last line, else
    anywhere.
    """
    pieces: list[str] = []
    start = 0
    while len(text) - start > max_chars:
        # Looking no further back than half a piece keeps the pieces from becoming slivers.
        earliest, end = start + max_chars // 2, start + max_chars
        cuts = [text.rfind(f"\n{opening}", earliest, end) for opening in ("class ", "def ", "async def ", "@")]
        cut = max(cuts)
        if cut < 0:
            cut = text.rfind("\n", earliest, end)
        cut = end if cut < 0 else cut + 1
        pieces.append(text[start:cut])
        start = cut
    return [*pieces, text[start:]]
