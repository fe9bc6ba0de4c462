"""Why a value has its layout: the chain from the value back to the plan entries, rule by rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch.fx import GraphModule, Node

from shardc.compiler.errors import ShardingError
from shardc.compiler.ir.node import of, specs, target_name
from shardc.compiler.ir.text import node_text
from shardc.compiler.plan.match import nearest

DEPTH = 40


def explain(gm: GraphModule, before: GraphModule, name: str, names: dict[str, str]) -> str:
    """The chain for one value, by mesh dim. `before` is the graph at global shapes, asked first: localizing
    takes some operators apart. Raises ShardingError for a name that is not in the program."""
    by_name = {n.name: n for graph in (gm.graph, before.graph) for n in graph.nodes}
    if name not in by_name:
        close = nearest(name, list(by_name))
        raise ShardingError(f"no value %{name} in the program", help=f"nearest name: %{close}" if close else "")
    node = by_name[name]
    lines = [node_text(node, names)]
    if of(node).where:
        lines.append(f"  at {of(node).where} ({of(node).path or 'root module'})")
    layouts = specs(node)
    axes = [a for s in layouts for a in (*s.axes(), *(p[0] for p in s.pending))]
    if not axes:
        lines.append("  whole on every rank: no mesh dim splits it")
    for axis in dict.fromkeys(axes):
        lines.append(f"  {axis}:")
        lines += [f"    {line}" for line in _chain(node, axis, names, by_name)]
    return "\n".join(lines)


def cause(node: Node, axis: str, names: dict[str, str]) -> str:
    """Where a value's split (or pending sum) over a mesh dim comes from: the end of its chain, in one line."""
    return list(_chain(node, axis, names))[-1]


def _chain(node: Node, axis: str, names: dict[str, str], by_name: Mapping[str, Node] | None = None) -> Iterator[str]:
    """by_name: the graph to go on in, for names that it has."""
    for _ in range(DEPTH):
        source = source_of(node, axis)
        yield _line(node, source, names)
        if source is None:
            return
        node = (by_name or {}).get(source.name, source)
    yield "..."


def source_of(node: Node, axis: str) -> Node | None:
    """The operand from which a value has its split, or its pending sum, over a mesh dim; None at a chain's end."""
    if node.op == "placeholder" or of(node).why:
        return None
    return next((n for n in node.all_input_nodes if any(_has(s, axis) for s in specs(n))), None)


def rule_text(node: Node) -> str:
    """The rule that propagation used; empty where there was none."""
    rule = of(node).rule
    return rule.text if rule is not None and rule.text else ""


def _line(node: Node, source: Node | None, names: dict[str, str]) -> str:
    reason = of(node).why
    if node.op == "placeholder":
        return f"%{node.name} is {names.get(node.name, 'an input')}, laid out so by {reason or 'its default'}"
    if reason:
        return f"%{node.name} was laid out so by {reason}"
    how = f" (rule {rule_text(node)})" if rule_text(node) else ""
    if source is None:
        return f"%{node.name} = {target_name(node.target)}{how}: the split begins here"
    return f"%{node.name} = {target_name(node.target)}{how}, from %{source.name}: {specs(source)[0]}"


def _has(layout, axis: str) -> bool:
    return axis in layout.axes() or layout.reduction(axis) is not None
