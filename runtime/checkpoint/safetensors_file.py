"""Files of whole weights in the safetensors format.

Its library reads them without copying: a tensor is a view of the mapped file, of which a rank copies its piece. It
writes only what is all there at once; here tensors are written one by one, so that a model need not fit on one rank.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardc.compiler.errors import CheckpointError

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file by name. Raises CheckpointError that names the file, and the key, where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        why = str(error).removeprefix("Error while deserializing header: ")
        raise CheckpointError(f"{path.name} is damaged: {why}", help="write or fetch the file again") from None


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
