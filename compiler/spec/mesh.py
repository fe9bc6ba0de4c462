"""A mesh of ranks as integers: names and sizes of its dims, coordinates, groups. No process group.

Where a mesh dim is named, a part of one may be: `dp/2` is every two consecutive ranks of dp.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
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
        dim, slash, ways = name.rpartition("/")
        if slash and dim in self:
            return int(ways)
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

    def dim_of(self, name: str) -> str:
        """The mesh dim that this is, or is a part of."""
        return name if name in self else name.rpartition("/")[0]

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
        """The ranks that differ from `rank` in this mesh dim, or part of one, only, in order of that coordinate."""
        coords, dim, size = self.coords(rank), self.dim_of(name), self[name]
        first = coords[dim] // size * size
        return tuple(self.rank({**coords, dim: first + i}) for i in range(size))

    def groups(self, name: str) -> list[tuple[int, ...]]:
        """All groups along a mesh dim, or a part of one."""
        dim, size = self.dim_of(name), self[name]
        others = [range(0, n, size) if known == dim else range(n) for known, n in self._sizes]
        firsts = (self.rank(dict(zip(self.names, c, strict=True))) for c in itertools.product(*others))
        return [self.group(name, first) for first in firsts]


def part_of(name: str, ways: int) -> str:
    """The name of every `ways` consecutive ranks of a mesh dim."""
    return f"{name}/{ways}"


def place(coords: Mapping[str, int], name: str) -> int:
    """The coordinate along a mesh dim, or along a part of one."""
    if name in coords:
        return coords[name]
    dim, _, ways = name.rpartition("/")
    return coords[dim] % int(ways)
