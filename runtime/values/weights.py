"""Weights to start from: a state_dict, a safetensors file or a folder of them, a folder of a distributed checkpoint."""

# torch.distributed.checkpoint lists no names of its own:
# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from shardc.compiler.errors import CheckpointError
from shardc.runtime.checkpoint.files import read_into, read_metadata
from shardc.runtime.checkpoint.optimizers import is_optimizer_key
from shardc.runtime.checkpoint.safetensors_file import read_safetensors


def weights(source: Mapping[str, Tensor] | str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """Whole tensors by name, each read when it is asked for. Raises CheckpointError for a path that holds none."""
    if isinstance(source, Mapping):
        return source
    path = Path(source)
    if path.is_file():
        return read_safetensors(path)
    if (path / ".metadata").is_file():
        return _Folder(path)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"there are no weights at {path}", help="give a .safetensors file, a folder of them, or a DCP folder"
        )
    return {key: x for file in files for key, x in read_safetensors(file).items()}


class _Folder(Mapping[str, Tensor]):
    """The model's tensors in a folder that torch.distributed.checkpoint wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        entries: dict[str, Any] = read_metadata(folder).state_dict_metadata
        self._entries = {
            key: entry
            for key, entry in entries.items()
            if isinstance(entry, TensorStorageMetadata) and not is_optimizer_key(key)
        }

    def shape_of(self, key: str) -> torch.Size:
        """Known without reading the values."""
        return self._entries[key].size

    def __getitem__(self, key: str) -> Tensor:
        entry = self._entries[key]
        made = torch.empty(entry.size, dtype=entry.properties.dtype)
        read_into({key: made}, self._folder, alone=True)
        return made

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
