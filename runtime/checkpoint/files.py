"""The files of a distributed checkpoint: replaced at once when they are whole, and checked before they are believed.

A save writes files of new names beside those of the last one, and switches by renaming `.metadata`, the one file
that says which belong together. So a save that is killed leaves the last checkpoint as it was. torch writes each
value as a zip archive with checksums but does not look at them when it reads; here they are looked at. `.metadata`
ends in a checksum of its own, behind the pickle, where torch does not read on.
"""

# torch.distributed.checkpoint lists no names of its own:
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import os
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan
from torch.futures import Future

from shardc.compiler.errors import CheckpointError
from shardc.runtime.checkpoint.unpickle import Refused, description

TRAILER = 14  # bytes
MARK = b"crc32:"  # and eight hexadecimal digits, at the end of .metadata


class Files(FileSystem):
    """Nothing is deleted before it is replaced: the writer finds no older checkpoint to delete."""

    def exists(self, path: str | os.PathLike) -> bool:
        return False

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Only `.metadata` is renamed, as the last thing of a save."""
        with Path(path).open("r+b") as file:
            checksum = zlib.crc32(file.read())
            file.write(MARK + f"{checksum:08x}".encode())
            file.flush()
            os.fsync(file.fileno())
        super().rename(path, new_path)


class Writer(dcp.FileSystemWriter):
    def __init__(self, path: Path, **options: Any) -> None:
        super().__init__(path, **options)
        self.fs = Files()

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        fresh = uuid4().hex[:12]
        made = super().prepare_global_plan(plans)
        return [replace(p, storage_data=replace(p.storage_data, prefix=f"__{fresh}_{i}_")) for i, p in enumerate(made)]

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        super().finish(metadata, results)
        kept = {info.relative_path for info in (metadata.storage_data or {}).values()}
        for file in Path(self.path).glob("__*.distcp"):
            if file.name not in kept:
                file.unlink(missing_ok=True)


class Reader(dcp.FileSystemReader):
    """Raises CheckpointError that names the file and the key where a value is not as it was written."""

    def __init__(self, folder: Path, allow_pickle: bool = False) -> None:
        super().__init__(folder)
        self._allow = allow_pickle

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        found = read_metadata(Path(self.path), self._allow)
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for index in dict.fromkeys(item.storage_index for item in plan.items):
            info = self.storage_data[index]
            _check(Path(self.path) / info.relative_path, index.fqn, info.offset, info.length)
        return super().read_data(plan, planner)


class _Planner(dcp.DefaultLoadPlanner):
    """Of values that are no tensors, plain ones alone are built."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        name = read_item.dest_index.fqn
        try:
            held = torch.load(value, weights_only=True)
        except Exception as error:  # a damaged pickle may raise anything
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{name} cannot be read: it is no plain value ({text[:200]})",
                help="load_checkpoint(..., allow_pickle=True), if you trust whoever wrote it",
            ) from error
        again = BytesIO()
        torch.save(held, again)
        again.seek(0)
        super().load_bytes(read_item, again)


def _check(file: Path, key: str, offset: int, length: int) -> None:
    """Whether the bytes of one value are those that were written."""
    why = ""
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            held = stream.read(length)
        if len(held) < length:
            why = "the file is cut off"
        else:
            with zipfile.ZipFile(BytesIO(held)) as archive:
                broken = archive.testzip()
            why = "a checksum is wrong" if broken else ""
    except OSError as error:
        why = error.strerror or type(error).__name__
    except (zipfile.BadZipFile, NotImplementedError, zlib.error, EOFError, RuntimeError, ValueError) as error:
        why = str(error)  # whatever zipfile says of bytes that are no archive
    if why:
        raise CheckpointError(f"{key} in {file} cannot be read: {why}", help="take an older checkpoint")


def read_metadata(folder: Path, allow_pickle: bool = False) -> Metadata:
    """What a folder holds. Raises CheckpointError where there is nothing, it is damaged, names what no checkpoint
    needs, or says that a value lies outside of the folder."""
    file = folder / ".metadata"
    why, found = "", None
    try:
        held = file.read_bytes()
        if held[-TRAILER:].startswith(MARK) and held[-TRAILER:] != MARK + f"{zlib.crc32(held[:-TRAILER]):08x}".encode():
            why = "a checksum is wrong"
        else:
            found, end = (pickle.loads(held), len(held)) if allow_pickle else description(held)
            why = "" if end == len(held) or held[end:].startswith(MARK) or allow_pickle else "a checksum is wrong"
    except FileNotFoundError:
        why = "there is no such file"
    except Refused as error:
        why = str(error)
    except Exception as error:  # a damaged pickle may raise anything
        why = type(error).__name__
    if not why and not (isinstance(found, Metadata) and isinstance(found.state_dict_metadata, dict)):
        why = f"it holds a {type(found).__name__}"
    why = why or _misplaced(folder, getattr(found, "storage_data", None) or {})
    if why:
        raise CheckpointError(f"{file} cannot be read: {why}", help="is this the folder of a checkpoint?")
    assert isinstance(found, Metadata)
    return found


def _misplaced(folder: Path, stored: Any) -> str:
    """What is wrong with where values are said to lie."""
    within = folder.resolve()
    for info in stored.values() if isinstance(stored, dict) else ():
        name, numbers = getattr(info, "relative_path", None), (getattr(info, n, None) for n in ("offset", "length"))
        if not isinstance(name, str) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            return "it does not say where a value lies"
        if not (within / name).resolve().is_relative_to(within):
            return f"it names {name}, which lies outside of the folder"
    return ""


def read_into(staged: dict[str, Any], folder: Path, *, alone: bool | None = None, allow_pickle: bool = False) -> None:
    """Read these keys of a checkpoint into the tensors given. alone: without the other ranks. allow_pickle: build
    whatever the files name.

    Raises CheckpointError, on every rank that takes part, for what is damaged.
    """
    read_metadata(folder, allow_pickle)  # before torch looks at it
    try:
        with alone_is_meant():
            no_dist = not dist.is_initialized() if alone is None else alone
            planner = dcp.DefaultLoadPlanner() if allow_pickle else _Planner()
            dcp.load(staged, storage_reader=Reader(folder, allow_pickle), planner=planner, no_dist=no_dist)
    except CheckpointError:
        raise
    except (Exception, dcp.CheckpointException) as error:  # torch's own is no Exception
        raise _named(error, folder) from error


def _named(error: BaseException, folder: Path) -> CheckpointError:
    """The first rank's CheckpointError of those that torch has collected, or what else went wrong."""
    failures = [e for e, _ in getattr(error, "failures", {}).values()] or [error]
    ours = next((e for e in failures if isinstance(e, CheckpointError)), None)
    if ours is not None:
        return CheckpointError(ours.what, help="nothing was loaded; take an older checkpoint")
    text = str(failures[0]).strip().splitlines()
    cause = f"{type(failures[0]).__name__}: {text[-1] if text else ''}"
    return CheckpointError(f"{folder} cannot be read: {cause}", help="nothing was loaded; take an older checkpoint")


@contextmanager
def alone_is_meant() -> Iterator[None]:
    """Where there is no process group, torch says so at every save and load."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        warnings.filterwarnings("ignore", "Detected an existing checkpoint", UserWarning)
        yield
