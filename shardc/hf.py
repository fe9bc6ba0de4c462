"""Hugging Face: a `Plan` from what a transformers model says of itself, adapters of peft included.

Neither transformers nor peft is imported here: only the model that is given is asked.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.entries import DataEntry, Replicated
from shardc.compiler.plan.match import find
from shardc.compiler.plan.plan import Plan

# What an adapter beside a split weight does. B makes the columns that the weight makes; A takes the rows that it takes.
FOLLOWS = {"colwise": "lora_B", "rowwise": "lora_A"}
# Where peft keeps what it wrapped: the layer beside an adapter, or a module and the copy of it that is trained.
BASE, WHOLE, COPIES = "base_layer", "original_module", "modules_to_save"


def plan(model: nn.Module, *, tp: str | None = "tp", dp: str | None = "dp", data: DataEntry | None = None) -> Plan:
    """A plan for a transformers model: tensor parallel by its own `tp_plan`, data parallel beside it.

    model: a transformers model, or one that peft has wrapped. Of a layer with a LoRA adapter the base weight is split
        as the model says, and the adapter's half on the split side follows it; the other half stays whole.
    tp, dp: the mesh dims that do so; None leaves one out.
    data: what dp does, `Replicated()` where nothing is said; `FullyShard("model.layers.*")` shards the layers.

    Returns the `Plan`; print it to see its lines, or to write them by hand. Raises PlanError for a model that has no
    `tp_plan`, and for `data` without a mesh dim. Source of the entries: transformers' `PreTrainedModel.tp_plan`.

        mesh = shardc.Mesh(dp=2, tp=2)
        compiled = shardc.compile(model, shardc.hf.plan(model), mesh=mesh)
    """
    if data is not None and not isinstance(data, DataEntry):
        raise PlanError(f"data is {data!r}", help="write data=Replicated(...) or data=FullyShard(...)")
    if data is not None and dp is None:
        raise PlanError(f"data is {data!r}, and dp is None", help='name the mesh dim that it is for: dp="dp"')
    entries: dict[str, object] = {}
    if dp is not None:
        entries[dp] = data or Replicated()
    if tp is not None:
        entries[tp] = _tensor_parallel(model)
    return Plan(**entries)


def _tensor_parallel(model: nn.Module) -> dict[str, str]:
    """The lines of the model's `tp_plan`, under the names that modules have now."""
    prefix, own = _own_plan(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [*modules, *(name for name, _ in model.named_parameters(remove_duplicate=False))]
    lines: dict[str, str] = {}
    for pattern, style in own.items():
        key = f"{prefix}.{pattern}" if prefix else pattern
        found = find(key, names)
        ways = {name: list(_under(modules.get(name), style)) for name in found}
        if len({tuple(way) for way in ways.values()}) == 1:  # one line says it of all layers
            ways = {key: ways[found[0]]}
        for name, way in ways.items():
            lines |= {f"{name}.{below}" if below else name: of for below, of in way}
    return lines


def _under(module: nn.Module | None, style: str) -> Iterator[tuple[str, str]]:
    """What a style for a module says of the modules below it, or of itself (""), where peft has wrapped it."""
    below = dict(module.named_children()) if module is not None else {}
    if BASE in below:
        yield BASE, style
        side = next((side for kind, side in FOLLOWS.items() if kind in style), "")
        # What a gathered output or an own split of the input asks for holds for the layer, so for both of its summands.
        for adapter in getattr(below.get(side), "keys", list)():
            yield f"{side}.{adapter}", style
    elif WHOLE in below:
        yield WHOLE, style
        for adapter in getattr(below.get(COPIES), "keys", list)():
            yield f"{COPIES}.{adapter}", style
    else:
        yield "", style


def _own_plan(model: nn.Module) -> tuple[str, dict[str, str]]:
    """The name of the model within its wrappers, and its `tp_plan`."""
    # Asked of the type: peft's wrappers hand on what they do not have, under names that are not theirs.
    for name, module in model.named_modules():
        if hasattr(type(module), "tp_plan"):
            own = getattr(module, "tp_plan", None)
            if own:
                return name, dict(own)
            break
    raise PlanError(
        f"{type(model).__name__} has no tp_plan",
        help='write the styles of its layers: Plan(tp={"layers.*.q_proj": ColwiseParallel(), ...})',
    )
