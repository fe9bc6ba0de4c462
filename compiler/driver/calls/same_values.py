"""Values that ranks must hold alike, as texts that they compare: a line a tensor, with a digest of its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardc.compiler.errors import RankMismatchError
from shardc.compiler.ir.signature import InputKind, Signature
from shardc.runtime.run.ranks import Ranks
from shardc.runtime.wire.distribute import local_of
from shardc.runtime.wire.handshake import agree


def constants(signature: Signature) -> str:
    """The plain tensors that a program reads of its module: neither parameters nor buffers, which compile spreads."""
    found = [(x.name, x.value) for x in signature.inputs if x.kind is InputKind.CONSTANT]
    return "\n".join(
        f"value of {name}: {digest(x)}" for name, x in found if type(x) is not DTensor and isinstance(x, Tensor)
    )


def check_replicas(held: Mapping[str, Tensor], split_over: Callable[[str], tuple[str, ...]], ranks: Ranks) -> None:
    """Raises RankMismatchError, on every rank of the mesh, where some tensor differs between ranks that hold the same
    part of it. All ranks call it. split_over: the mesh dims along which ranks hold different parts."""
    lines: dict[tuple[str, ...], list[str]] = {}
    for name, x in held.items():
        lines.setdefault(split_over(name), []).append(f"{name}: {digest(local_of(x.detach()))}")
    told = ""
    for axes in sorted(lines):
        try:
            agree(lines[axes], _holding_the_same(axes, ranks), WHAT)
        except RankMismatchError as error:  # other ranks have more to compare, and wait for this one
            told = told or str(error)
    try:
        agree("different" if told else "equal", ranks.groups, f"{WHAT}, as compared by ranks that hold the same")
    except RankMismatchError as error:
        raise RankMismatchError(told or str(error)) from None
    if told:
        raise RankMismatchError(told)


WHAT = "what ranks hold alike"


def _holding_the_same(axes: tuple[str, ...], ranks: Ranks) -> tuple[int, ...]:
    mesh, mine = ranks.mesh, [ranks.coords[a] for a in axes]
    places = [p for p in range(mesh.size) if [mesh.coords(p)[a] for a in axes] == mine]
    return tuple(ranks.groups.ranks[p] for p in places)


def digest(x: Tensor) -> str:
    """Of shape, dtype and bits; of a tensor without values its shape alone."""
    about = f"{x.dtype}{[*x.shape]}"
    if x.is_meta or x.layout is not torch.strided:
        return about
    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{about} {hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]}"
