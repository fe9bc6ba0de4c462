"""Which factor of a dim an open split should take: the outermost that nothing behind it needs other pieces of."""

from __future__ import annotations

from torch.fx import GraphModule

from shardc.compiler.infer.atoms import Atom, Atoms
from shardc.compiler.infer.decisions import Decisions
from shardc.compiler.ir.graph import inputs_of
from shardc.compiler.ir.signature import InputKind, Signature
from shardc.compiler.plan.param_layout import ParamLayout
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.spec.mesh import Mesh
from shardc.compiler.spec.spec import Part, Spec, canonical


def refinements(
    gm: GraphModule,
    signature: Signature,
    plan: Resolved,
    mesh: Mesh,
    known: Decisions | None = None,
    atoms: Atoms | None = None,
) -> dict[str, Spec]:
    """Better layouts to compute with, by parameter; those whose plain split is as good are left out. atoms: of the
    graph, where they are known."""
    held = [(plan.params[entry.name], node) for entry, node in inputs_of(gm, signature, InputKind.PARAMETER)]
    if not any(layout.open for layout, _ in held):
        return {}
    atoms, out = atoms or Atoms(gm.graph.nodes, known), {}
    for layout, node in held:
        plain = layout.compute
        better = _refined(plain, layout, [atoms.of(node, d) for d in range(len(plain.dims))], mesh)
        if better != plain:
            out[layout.fqn] = better
    return out


def _refined(spec: Spec, layout: ParamLayout, leaves: list[list[Atom]], mesh: Mesh) -> Spec:
    for axis in mesh.names:
        dim = spec.dim_of(axis)
        if axis in layout.open and dim is not None and spec.dims[dim] == (Part(spec.shape[dim], (axis,)),):
            spec = spec.with_dim(dim, _on_atom(leaves[dim], axis, mesh))
    return spec


def _on_atom(leaves: list[Atom], axis: str, mesh: Mesh) -> tuple[Part, ...]:
    """The dim with that leaf split which least is needed of, and the outermost of those."""
    chosen = min(range(len(leaves)), key=lambda i: leaves[i].needs, default=0)
    parts = tuple(Part(leaf.size, (axis,) if i == chosen else ()) for i, leaf in enumerate(leaves))
    return canonical(parts or (Part(1, (axis,)),), mesh)
