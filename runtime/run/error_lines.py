"""Adds to an error from inside a program which call raised it, and which line of the user's that call comes from."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from torch.fx import GraphModule, Node

from shardc.compiler.ir.node import of, target_name


@contextmanager
def blaming(node: Node) -> Iterator[None]:
    """For a graph run node by node."""
    try:
        yield
    except Exception as error:
        _blame(error, node)
        raise


@contextmanager
def blaming_line(gm: GraphModule) -> Iterator[None]:
    """For a graph run as its generated code, by `gm.forward`: the line that raised assigns to the call's name."""
    try:
        yield
    except Exception as error:
        code = type(gm).forward.__code__
        lines = [n for frame, n in traceback.walk_tb(error.__traceback__) if frame.f_code is code]
        names = {n.name: n for n in gm.graph.nodes}
        text = gm.code.splitlines()[lines[0] - 1] if lines else ""
        found = re.match(r"\s*(\w+)", text)
        if found and found[1] in names:
            _blame(error, names[found[1]])
        raise


def _blame(error: Exception, node: Node) -> None:
    where = of(node).where
    error.add_note((f"  --> {where}\n" if where else "") + f"   | > %{node.name} = {target_name(node.target)}")
