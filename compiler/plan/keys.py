"""A dict of patterns meets the model: what each key asks of parameters and of values at module borders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.forwards import Forward
from shardc.compiler.plan.match import Index, Unmatched, claims, did_you_mean, find, join
from shardc.compiler.plan.plan import Wish, wish_text
from shardc.compiler.plan.resolved import Boundary
from shardc.compiler.plan.splits import Split, cut, cut_parameter
from shardc.compiler.plan.styles import PLACEMENTS, Port, Style, read_style
from shardc.compiler.plan.wording import placement_code, same_wish

# What says more about a parameter wins: its own key, then its module's, then that of a module further out.
BY_NAME, BY_MODULE, BY_ANCESTOR = 3, 2, 1


@dataclass(frozen=True)
class Key:
    """One line of a mesh dim's dict."""

    axis: str
    pattern: str
    wish: Wish

    @property
    def place(self) -> str:
        return f'{self.axis}["{self.pattern}"]'

    def __str__(self) -> str:
        return f"{self.place} = {wish_text(self.wish)}"


@dataclass(frozen=True)
class Claim:
    """What one key asks of one parameter, found under the name `via`; the highest rank wins."""

    placement: Placement
    open: bool
    key: str
    via: str
    rank: tuple[int, int]


@dataclass
class Keyed:
    """What a mesh dim's dict asks for, by canonical names; the fields are those of `Resolved`."""

    layouts: dict[str, Claim] = field(default_factory=dict)
    boundaries: list[Boundary] = field(default_factory=list)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)
    unmatched: list[Unmatched] = field(default_factory=list)


def resolve_keys(axis: str, entry: Mapping[str, Wish], index: Index) -> Keyed:
    """What the dict of one mesh dim asks of this model.

    Raises PlanError for a key of the wrong kind, two keys that disagree, and a style that does not fit.
    """
    out, asked = Keyed(), {}
    keys = {pattern: Key(axis, pattern, wish) for pattern, wish in entry.items()}
    for_modules, for_tensors = _sort_keys(keys, index, out)
    for fqn, key in _keys_of_modules(for_modules, index).items():
        for claim in _apply_style(key, fqn, index, out):
            asked.setdefault(index.tensor(claim.via), []).append(claim)
    for name, matching in claims(for_tensors, index.tensors).items():
        claim = _name_tensor(_one_key([keys[p] for p in matching], name), name, index)
        asked.setdefault(index.tensor(name), []).append(claim)
    out.layouts = {tensor: _settle(tensor, found) for tensor, found in asked.items()}
    return out


def _sort_keys(keys: Mapping[str, Key], index: Index, out: Keyed) -> tuple[dict[str, Key], dict[str, Key]]:
    """The keys that name modules and those that name parameters or buffers; the rest is noted in `out`."""
    for_modules: dict[str, Key] = {}
    for_tensors: dict[str, Key] = {}
    for pattern, key in keys.items():
        placed, named = isinstance(key.wish, PLACEMENTS), isinstance(key.wish, str)
        modules, tensors = find(pattern, index.modules), find(pattern, index.tensors)
        if modules and not placed:
            for_modules[pattern] = key
        elif tensors and (placed or named):
            for_tensors[pattern] = key
        elif modules or tensors:
            raise _wrong_kind(key, modules, tensors, index)
        else:
            known = [*(index.tensors if placed or named else ()), *(() if placed else index.modules)]
            out.unmatched.append(Unmatched(key.place, pattern, known))
    return for_modules, for_tensors


def _keys_of_modules(keys: Mapping[str, Key], index: Index) -> dict[str, Key]:
    """Canonical module name -> its key, in the order of the modules."""
    found = claims(keys, index.modules)
    chosen: dict[str, tuple[str, Key]] = {}
    for name in (n for n in index.modules if n in found):
        key = _one_key([keys[p] for p in found[name]], name)
        via, before = chosen.setdefault(index.module(name), (name, key))
        if not same_wish(before.wish, key.wish):
            raise PlanError(
                f"{via} and {name} are one module, with two styles",
                excerpt=f"{before}\n{key}",
                help="keep one of the two keys",
            )
    return {name: key for name, (_, key) in chosen.items()}


def _one_key(keys: Sequence[Key], name: str) -> Key:
    first, *others = keys
    for key in others:
        if not same_wish(first.wish, key.wish):
            raise PlanError(
                f"two keys match {name or 'the model'}",
                excerpt=f"{first}\n{key}",
                help=f'a key that writes the name out wins over patterns: add "{name}"',
            )
    return first


def _apply_style(key: Key, fqn: str, index: Index, out: Keyed) -> list[Claim]:
    """Claims of a style on a module's parameters; what it says of the module's borders goes to `out`."""
    style = read_style(key.wish, key.place)
    asked: list[Claim] = []
    ports = style.ports
    if style.split in ("columns", "rows"):
        split = cut(index, fqn, style, str(key))
        asked = _cut_claims(key, fqn, split, index)
        ports = _cut_ports(style, split)
    elif style.split == "whole":
        asked = _whole_claims(key, fqn, index)
    _check_forward(style, key, fqn, index)
    for p in ports:
        border = Boundary(fqn, p.side, p.index, key.axis, p.declared, p.desired, p.open, p.explicit, str(key))
        out.boundaries.append(border)
    out.counts.update({(fqn, side): count for side, count in style.counts})
    return asked


def _cut_claims(key: Key, fqn: str, split: Split, index: Index) -> list[Claim]:
    wanted = [(name, dim, (BY_MODULE, 0)) for name, dim in split.dims.items()]
    wanted += [(name, dim, (BY_ANCESTOR, fqn.count("."))) for name, dim in split.inner]
    out = []
    for name, dim, rank in wanted:
        full = join(fqn, name)
        if full in index.parameters:
            placement = Replicate() if dim is None else fit(Shard(dim), index.parameters[full], full, key)
            out.append(Claim(placement, dim is not None, str(key), full, rank))
    return out


def _cut_ports(style: Style, split: Split) -> tuple[Port, ...]:
    takes, gives = style.takes or split.takes, style.gives or split.gives
    ins = (Port("in", i, takes, split.takes, True, style.takes is not None) for i in split.inputs)
    return (*ins, Port("out", split.output, None, gives, style.gives is None, style.gives is not None))


def _whole_claims(key: Key, fqn: str, index: Index) -> list[Claim]:
    """Claims that a module's parameters, and less firmly those of modules inside it, stay whole."""
    out = []
    for name, _ in index.modules[fqn].named_parameters(remove_duplicate=False):
        rank = (BY_ANCESTOR, fqn.count(".")) if "." in name else (BY_MODULE, 0)
        out.append(Claim(Replicate(), False, str(key), join(fqn, name), rank))
    return out


def _name_tensor(key: Key, name: str, index: Index) -> Claim:
    """The claim of a key on the parameter or buffer that it names."""
    tensor, rank = index.tensors[name], (BY_NAME, 0)
    if isinstance(key.wish, PLACEMENTS):
        return Claim(fit(key.wish, tensor, name, key), False, str(key), name, rank)
    style = read_style(key.wish, key.place)
    if style.ports:
        raise PlanError(f"{key} names the parameter {name}", help="this string is for a module")
    placement = cut_parameter(style, tensor.ndim)
    return Claim(placement, isinstance(placement, Shard), str(key), name, rank)


def fit(placement: Placement, tensor: Tensor, fqn: str, key: Key) -> Placement:
    """The placement with its dim counted from the front; PlanError where the tensor has no such dim."""
    dim = getattr(placement, "dim", None)
    if dim is None:
        return placement
    if not -tensor.ndim <= dim < tensor.ndim:
        shape = "x".join(map(str, tensor.shape))
        raise PlanError(
            f"{key} splits dim {dim} of {fqn}, which has {tensor.ndim} dims",
            help=f"name a dim of its shape {shape}" if shape else "leave a scalar whole: Replicate()",
        )
    if isinstance(placement, _StridedShard):
        return _StridedShard(dim % tensor.ndim, split_factor=placement.split_factor)
    return Shard(dim % tensor.ndim)


def _settle(tensor: str, found: list[Claim]) -> Claim:
    """The claim that wins; PlanError where equals disagree, as two modules that share a parameter can."""
    top = max(claim.rank for claim in found)
    first, *others = [claim for claim in found if claim.rank == top]
    for other in others:
        if other.placement != first.placement:
            a, b = placement_code(first.placement), placement_code(other.placement)
            raise PlanError(
                f"{first.via} and {other.via} are one tied parameter, laid out in two ways",
                excerpt=f"{first.via} is {a}: {first.key}\n{other.via} is {b}: {other.key}",
                help=f'decide by its name: "{tensor}": {a}',
            )
    closed = not all(claim.open for claim in (first, *others))
    return Claim(first.placement, False, first.key, first.via, first.rank) if closed else first


def _wrong_kind(key: Key, modules: list[str], tensors: list[str], index: Index) -> PlanError:
    if tensors:
        owner = tensors[0].rpartition(".")[0]
        return PlanError(
            f"{key} names {tensors[0]}, a parameter or buffer",
            help=f'a style is for a module: write "{owner}", or give the parameter a placement',
        )
    own = [join(modules[0], name) for name in index.owned(modules[0])]
    return PlanError(
        f"{key} names {modules[0] or 'the model'}, a module",
        help=f"a placement is for a parameter: {', '.join(own) or 'this module has none of its own'}",
    )


def _check_forward(style: Style, key: Key, fqn: str, index: Index) -> None:
    """Lists of layouts and names of keyword arguments fit what forward takes, where its signature tells."""
    names = [port.index for port in style.ports if isinstance(port.index, str)]
    count = dict(style.counts).get("in")
    if count is None and not names:
        return
    forward, called = Forward.of(index.modules[fqn].forward), fqn or "the model"
    # With layouts by name some of the required arguments may come by name too.
    if count is not None and (not forward.may_take(count) or (count < forward.required and not names)):
        least, most = forward.required, len(forward.positional)
        takes = f"{least} to {most}" if least < most else f"{most}"
        raise PlanError(
            f"{key.place}: input_layouts has {count} layouts, "
            f"but forward of {called} takes {takes} positional arguments",
            help="give one layout for each, None for what is left alone",
        )
    for name in names:
        if not forward.may_have(name):
            raise PlanError(
                f"{key.place}: input_kwarg_layouts names {name}, which forward of {called} does not take",
                help=did_you_mean(name, forward.names),
            )
