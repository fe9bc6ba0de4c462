"""A mesh of ranks as integers: names and sizes of its dims, coordinates, groups. No process group."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from shardc.compiler.errors import PlanError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Mesh:
    """`Mesh(dp=2, tp=4)`: eight ranks, numbered row by row, the first mesh dim outermost.

    A rank here is a position in the mesh; which process sits there is the runtime's business.
    """

    __slots__ = ("_sizes",)

    def __init__(self, **sizes: int) -> None:
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise PlanError(f"mesh dim {name} has size {size!r}", help="a mesh dim's size is a positive integer")
        self._sizes = tuple(sizes.items())

    @classmethod
    def of(cls, mesh: Mesh | DeviceMesh) -> Mesh:
        """The integers of a torch `DeviceMesh`; a mesh without names gets `dim_0`, `dim_1`, ..."""
        if isinstance(mesh, Mesh):
            return mesh
        names = mesh.mesh_dim_names or tuple(f"dim_{i}" for i in range(mesh.ndim))
        return cls(**dict(zip(names, mesh.shape, strict=True)))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self._sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for _, size in self._sizes)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, name: str) -> int:
        for known, size in self._sizes:
            if known == name:
                return size
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(known == name for known, _ in self._sizes)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mesh) and self._sizes == other._sizes

    def __hash__(self) -> int:
        return hash(self._sizes)

    def __repr__(self) -> str:
        return f"Mesh({', '.join(f'{n}={s}' for n, s in self._sizes)})"

    def __str__(self) -> str:
        return "mesh " + " ".join(f"{n}={s}" for n, s in self._sizes)

    def coords(self, rank: int) -> dict[str, int]:
        """Coordinates of a rank by mesh dim."""
        out = {}
        for name, size in reversed(self._sizes):
            rank, out[name] = divmod(rank, size)
        return {name: out[name] for name in self.names}

    def rank(self, coords: dict[str, int]) -> int:
        """The rank at these coordinates."""
        rank = 0
        for name, size in self._sizes:
            rank = rank * size + coords[name]
        return rank

    def group(self, name: str, rank: int) -> tuple[int, ...]:
        """The ranks that differ from `rank` in this mesh dim only, in order of that coordinate."""
        coords = self.coords(rank)
        return tuple(self.rank({**coords, name: i}) for i in range(self[name]))

    def groups(self, name: str) -> list[tuple[int, ...]]:
        """All groups along a mesh dim."""
        others = [range(size) if n != name else (0,) for n, size in self._sizes]
        firsts = (self.rank(dict(zip(self.names, c, strict=True))) for c in itertools.product(*others))
        return [self.group(name, first) for first in firsts]
