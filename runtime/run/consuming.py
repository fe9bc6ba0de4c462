"""A graph whose generated function takes one list and empties it, so that each value in it dies at its last use.

Arguments passed one by one are held by the caller until the function returns, whatever the function itself lets go.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule
from torch.fx.graph import CodeGen


class _Boxed(CodeGen):
    """`def forward(self, boxed)`, which takes its values out of the list first."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        names = [v.partition(":")[0].strip() for v in free_vars if v != "self"]
        define = super().gen_fn_def(["self", "boxed"], maybe_return_annotation, **options)
        taken = f"{', '.join(names)}, = boxed" if names else "pass"
        return f"{define}\n    {taken}; boxed.clear()"

    def process_inputs(self, *args: Any) -> Any:
        """What an interpreter gives the placeholders."""
        return args[0]


def boxed(gm: GraphModule) -> GraphModule:
    """The same module; `gm.forward(values)` with the list of what its placeholders take."""
    gm.graph.set_codegen(_Boxed())
    gm.recompile()
    return gm
