"""An open split takes the factor that survives the views behind it.

    %w: f32[48@tp, 64] = param wq.weight             tp=2, a style: rows are split, which factor is open
    %view: f32[8, 5, 3, 16] = aten.view(%q, ...)     three heads of 16
  ==>
    %reshard: f32[(3@tp 16), 64] = shardc.reshard(%w, ...)

so that heads stay whole on their ranks and nothing is gathered at the view. Left alone: layouts the user
closed with a placement, and splits that already lie between heads (4 heads on 2 ranks).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from shardc.compiler.atoms import Atom, Atoms
from shardc.compiler.collectives import reshard
from shardc.compiler.graph import insert, placeholders, spec
from shardc.compiler.mesh import Mesh
from shardc.compiler.pipeline import Context, PassResult
from shardc.compiler.signature import InputKind
from shardc.compiler.spec import Part, Spec, canonical
from shardc.compiler.verify import Stage


@dataclass(frozen=True)
class ChooseFactors:
    name = "choose-factors"
    takes = gives = Stage.TRACED
    exact = True

    def run(self, gm: GraphModule, ctx: Context) -> PassResult:
        changes: Counter = Counter()
        wanted = {
            e.node: ctx.plan.params[e.name].open
            for e in ctx.signature.inputs
            if e.kind is InputKind.PARAMETER and ctx.plan.params[e.name].open
        }
        if not wanted:
            return PassResult()
        atoms = Atoms(gm)
        for node in placeholders(gm):
            if node.name in wanted:
                changes["refined"] += _refine(node, wanted[node.name], atoms, ctx.mesh)
        return PassResult(changes)


def _refine(param: Node, axes: frozenset[str], atoms: Atoms, mesh: Mesh) -> int:
    """Reshard every use of a parameter that is computed with from its plain split to the chosen factor's."""
    made = 0
    gathers = [u for u in param.users if u.target is reshard]
    for value in [*gathers, *([] if gathers else [param])]:
        better = spec(value) if value is param else value.args[1]
        for axis in mesh.names:
            dim = better.dim_of(axis)
            if axis in axes and dim is not None and better.dims[dim] == _plain(better, dim, axis):
                better = better.with_dim(dim, _on_atom(atoms.of(param, dim), axis, mesh))
        if value is param and better != spec(param):
            users = [u for u in param.users if u.op != "output"]
            first = min(users, key=list(param.graph.nodes).index)
            with param.graph.inserting_before(first):
                new = insert(param.graph, reshard, (param, better), param, better, why="whole heads, not pieces")
            for user in users:
                user.replace_input_with(param, new)
            made += 1
        elif value is not param and better != value.args[1]:
            value.args = (param, better)
            value.meta["spec"] = better
            made += 1
    return made


def _plain(layout: Spec, dim: int, axis: str) -> tuple[Part, ...]:
    return (Part(layout.shape[dim], (axis,)),)


def _on_atom(leaves: list[Atom], axis: str, mesh: Mesh) -> tuple[Part, ...]:
    """The dim with the outermost leaf that nothing needs whole split; the outermost of all if there is none."""
    chosen = next((i for i, leaf in enumerate(leaves) if not leaf.whole), 0)
    parts = tuple(Part(leaf.size, (axis,) if i == chosen else ()) for i, leaf in enumerate(leaves))
    return canonical(parts or (Part(1, (axis,)),), mesh)
