"""Reading the files of `torch.distributed.checkpoint` (DCP) without running code from them.

`.metadata` is a pickle, and unpickling calls whatever the pickle names. Here it may name only the plain record types
that such a file consists of. DCP itself reads the tensors with `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as records
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from colonnade.errors import UsageError
from colonnade.runtime.vote import one_line

_RECORDS = (
    records.Metadata,
    records.TensorStorageMetadata,
    records.BytesStorageMetadata,
    records.ChunkStorageMetadata,
    records.TensorProperties,
    records.MetadataIndex,
    records.StorageMeta,
    records._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    torch.Size,
)
_ADMITTED: dict[tuple[str, str], Any] = {
    **{(record.__module__, record.__qualname__): record for record in _RECORDS},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    # torch.layout pickles as a call of this function, which only looks up a name in a table.
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
}
# What the unpickler raises for bytes that are not a pickle, or are a truncated or altered one.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise UsageError(f"it names {module}.{name}, which no checkpoint needs") from None


def load_metadata(stream: IO[bytes]) -> Metadata:
    """Unpickle DCP metadata, allowing only the record types that it consists of.

    Raises:
        UsageError: it names something else, or is damaged.
    """
    try:
        metadata = _RestrictedUnpickler(stream).load()
    except _DAMAGE as error:
        raise UsageError(f"it is damaged: {one_line(error)}") from error
    if not isinstance(metadata, Metadata):
        raise UsageError(f"it holds a {type(metadata).__name__}, not checkpoint metadata")
    return metadata


class SafeFileSystemReader(dcp.FileSystemReader):
    """DCP's file reader, with metadata that is read safely and checked in advance.

    The constructor reads no file. Call `read_checked_metadata` first; `read_metadata`, which DCP calls, then returns
    its result. So a damaged file is detected before any rank enters a collective.

    Args:
        path: the checkpoint's folder.
        files: names of the files that the checkpoint may be read from.
    """

    def __init__(self, path: Path, files: Collection[str]) -> None:
        super().__init__(path)
        self.files = frozenset(files)
        self._checked: Metadata | None = None

    def read_checked_metadata(self) -> dict[str, TensorStorageMetadata]:
        """Metadata of the tensors that the checkpoint stores, by name.

        Raises:
            UsageError: `.metadata` would run code, is damaged, lists anything but tensors, points to a file that is not
                one of `files`, uses a storage transformation, or leaves out part of a tensor.
        """
        file = Path(self.path) / ".metadata"
        try:
            with file.open("rb") as stream:
                metadata = load_metadata(stream)
            tensors = _checked_tensors(metadata, self.files)
        except UsageError as error:
            raise UsageError(f"{file} is refused: {error}") from error
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}") from error
        except (AttributeError, TypeError) as error:  # a record with missing or wrong fields
            raise UsageError(f"{file} is damaged: {one_line(error)}") from error
        self._checked = metadata
        return tensors

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._checked is None:
            self.read_checked_metadata()
        assert self._checked is not None
        return self._checked


def _checked_tensors(metadata: Metadata, files: frozenset[str]) -> dict[str, TensorStorageMetadata]:
    tensors: dict[str, TensorStorageMetadata] = {}
    for name, entry in metadata.state_dict_metadata.items():
        # DCP would unpickle a non-tensor entry without restrictions.
        if not isinstance(entry, TensorStorageMetadata):
            raise UsageError(f"entry {name!r} is not a tensor")
        # DCP reads the chunks that are listed and leaves the rest of a tensor unchanged.
        stored = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
        if stored != math.prod(entry.size):
            raise UsageError(f"it lists {stored} of the {math.prod(entry.size)} values of {name!r}")
        tensors[name] = entry
    for place in metadata.storage_data.values():
        if place.relative_path not in files:
            raise UsageError(f"it points at {place.relative_path!r}, which the manifest does not list")
        if getattr(place, "transform_descriptors", None):
            raise UsageError(f"{place.relative_path!r} is stored with a transformation this version does not read")
    return tensors
