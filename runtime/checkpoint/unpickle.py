"""Pickles are read as data: of what they may name, only the handful of classes that describe a checkpoint is built.

torch.distributed.checkpoint writes what a folder holds, and our optimizers' groups are written, as pickles. A pickle
may name any function and have it called; here whatever is not listed is refused before it is looked up.
"""

# torch.distributed.checkpoint lists no names of its own:
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import pathlib
import pickle
from collections import OrderedDict
from io import BytesIO
from typing import Any

import torch
from torch.distributed.checkpoint import metadata

LARGEST = 1 << 30  # bytes of a pickle; a description of a million tensors has a third of that
PLAIN = {("collections", "OrderedDict"): OrderedDict, ("torch", "Size"): torch.Size}
DTYPES = {("torch", str(x).removeprefix("torch.")): x for x in vars(torch).values() if isinstance(x, torch.dtype)}
DESCRIBE = {
    (metadata.__name__, name): getattr(metadata, name)
    for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta",
    )
}  # fmt: skip
PATHS = {("pathlib", name): pathlib.PurePosixPath for name in ("PosixPath", "PurePosixPath", "WindowsPath", "Path")}
LAYOUTS = {str(x): x for x in vars(torch).values() if isinstance(x, torch.layout)}


class StoredAt:
    """Where a value lies, in the place of torch's own class for it."""

    relative_path: str
    offset: int
    length: int
    transform_descriptors: Any = None


class Refused(pickle.UnpicklingError):
    """A pickle names what a checkpoint has no use for."""


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = {**PLAIN, **DTYPES, **self._more()}
        if (module, name) not in known:
            raise Refused(f"it names {module}.{name}, which no checkpoint needs")
        return known[module, name]

    def _more(self) -> dict[tuple[str, str], Any]:
        return {}

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("it refers to what lies elsewhere")


class _Description(_Plain):
    def _more(self) -> dict[tuple[str, str], Any]:
        stored = {("torch.distributed.checkpoint.filesystem", "_StorageInfo"): StoredAt}
        layouts = {("torch.serialization", "_get_layout"): LAYOUTS.__getitem__}
        formats = {(metadata.__name__, "_MEM_FORMAT_ENCODING"): getattr(metadata, "_MEM_FORMAT_ENCODING")}  # noqa: B009
        return {**DESCRIBE, **PATHS, **stored, **layouts, **formats}


def plain(data: bytes) -> Any:
    """What a pickle of plain values holds. Raises `Refused` for any other, and what pickle raises of damage."""
    return _read(_Plain, data)[0]


def description(data: bytes) -> tuple[Any, int]:
    """What the pickle at the start of these bytes says a folder holds, and where it ends."""
    return _read(_Description, data)


def _read(kind: type[_Plain], data: bytes) -> tuple[Any, int]:
    if len(data) > LARGEST:
        raise Refused(f"it is longer than {LARGEST >> 20} MiB")
    stream = BytesIO(data)
    return kind(stream).load(), stream.tell()
