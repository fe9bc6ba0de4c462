"""Files of whole weights in the safetensors format: a length, a JSON header, and the bytes of all tensors.

Read without copying: a tensor is a view of the mapped file, of which a rank copies its piece.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardc.compiler.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 100_000_000  # bytes; more is no header


class SafetensorsFile(Mapping[str, Tensor]):
    """The tensors of one file by name. Raises CheckpointError that names the file, and the key, where it is damaged."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            first = file.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else LARGEST_HEADER + 1
            if length > min(LARGEST_HEADER, size - 8):
                raise self._damaged("its header is cut off")
            try:
                header = json.loads(file.read(length))
            except ValueError:
                raise self._damaged("its header is not JSON") from None
        if not isinstance(header, dict):
            raise self._damaged("its header is no table of tensors")
        header.pop("__metadata__", None)
        self._start = 8 + length
        self._bytes = torch.from_file(str(self.path), size=size, dtype=torch.uint8) if size > self._start else None
        self._entries = {key: self._entry(key, entry, size - self._start) for key, entry in header.items()}

    def _entry(self, key: str, entry: Any, room: int) -> tuple[torch.dtype, tuple[int, ...], int, int]:
        """(dtype, shape, first byte, end) of one tensor, where that makes sense."""
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
            begin, end = (int(n) for n in entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise self._damaged(f"the entry of {key} makes no sense") from None
        if min((0, *shape)) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
            raise self._damaged(f"the size of {key} does not fit its shape")
        if not 0 <= begin <= end <= room:
            raise self._damaged(f"{key} lies beyond the end of the file")
        return dtype, shape, begin, end

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path.name} is damaged: {why}", help="write or fetch the file again")

    def __getitem__(self, key: str) -> Tensor:
        dtype, shape, begin, end = self._entries[key]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        assert self._bytes is not None
        found = self._bytes[self._start + begin : self._start + end]
        if (self._start + begin) % dtype.itemsize:
            found = found.clone()  # a view of another dtype must be aligned
        return found.view(dtype).view(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def write_safetensors(path: Path, layout: Mapping[str, Tensor], values: Iterator[Tensor]) -> None:
    """Write tensors one at a time. layout: their names, shapes and dtypes (on meta is enough), in the order of values.

    Raises CheckpointError for a dtype that the format lacks. What is at `path` is replaced at once, at the end.
    """
    offset = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, x in layout.items():
        if x.dtype not in NAMES:
            raise CheckpointError(f"{name} is {x.dtype}, which safetensors cannot hold", help="cast it before")
        end = offset + x.numel() * x.dtype.itemsize
        header[name] = {"dtype": NAMES[x.dtype], "shape": list(x.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for x in values:
                file.write(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
