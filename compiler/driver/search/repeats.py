"""Which modules of a model are alike: numbered children of one container, that a pattern names together."""

from __future__ import annotations

from typing import Any

from torch import nn

from shardc.compiler.plan.match import join


class Repeats:
    """stacks: FQNs of the containers whose numbered children are alike, in the model's order."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.stacks = [fqn for fqn, module in model.named_modules() if _alike(module)]

    @property
    def outermost(self) -> list[str]:
        """Those that lie in no other."""
        return [s for s in self.stacks if not any(s.startswith(join(o, "")) for o in self.stacks if o != s)]

    @property
    def units(self) -> tuple[str, ...]:
        """Patterns of the layers."""
        return tuple(dict.fromkeys(self.pattern(join(stack, "0")) for stack in self.outermost))

    def pattern(self, fqn: str) -> str:
        """A name with a star for the number of each layer that it lies in."""
        parts, out = fqn.split("."), []
        for i, part in enumerate(parts):
            out.append("*" if part.isdigit() and ".".join(parts[:i]) in self.stacks else part)
        return ".".join(out)


def _alike(module: nn.Module) -> bool:
    children = dict(module.named_children())
    forms = [_form(child) for child in children.values()]
    return (
        len(forms) > 1
        and all(n.isdigit() for n in children)
        and bool(forms[0][1])
        and forms.count(forms[0]) == len(forms)
    )


def _form(module: nn.Module) -> tuple[Any, ...]:
    held = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in module.named_parameters())
    return type(module), held
