"""Files of weights: written one tensor at a time, read by the format's own library."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import shardc
from shardc.compiler.errors import CheckpointError
from shardc.runtime.checkpoint.safetensors_file import NAMES
from shardc.runtime.values.weights import weights


def changed(**entry: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["bias"].update(entry)


@pytest.mark.parametrize(
    "edit",
    [
        changed(shape=[4]),
        changed(shape=[-3]),
        changed(dtype="F99"),
        changed(data_offsets=[4096, 4108]),
        changed(data_offsets=[0, 12]),  # where another one lies
        lambda header: header.pop("bias"),  # bytes that are nobody's
        lambda header: header.update(bias=3),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_with_the_files_name(edit: Callable[..., object], tmp_path: Path):
    path = tmp_path / "w.safetensors"
    shardc.save_safetensors(path, nn.Linear(3, 3))
    held = path.read_bytes()
    end = 8 + int.from_bytes(held[:8], "little")
    header = json.loads(held[8:end])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + held[end:])
    with pytest.raises(CheckpointError, match="w.safetensors is damaged: "):
        weights(path)


def test_what_is_written_is_read_in_every_dtype_by_us_and_by_the_formats_library(tmp_path: Path):
    module = nn.Module()
    for i, dtype in enumerate(NAMES):
        module.register_buffer(f"x{i}", torch.arange(5).to(dtype))
    module.register_buffer("none", torch.empty(0, 3))
    module.register_buffer("scalar", torch.tensor(3.0))
    shardc.save_safetensors(tmp_path / "w.safetensors", module)
    for found in (weights(tmp_path), load_file(tmp_path / "w.safetensors")):
        same_values(found, module.state_dict())


def same_values(found: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    assert found.keys() == state.keys()
    for name, x in state.items():
        y = found[name]
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        assert torch.equal(y.reshape(-1).view(torch.uint8), x.reshape(-1).view(torch.uint8))
