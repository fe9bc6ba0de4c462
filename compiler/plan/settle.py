"""The wishes for one mesh dim meet a model: whom each names, and which of them decides about a parameter.

What says more about a parameter wins: its own key, then its module's, then that of a module further out. A key that
writes a name out wins over patterns. Equals must agree.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.distributed.tensor import Placement, Shard

from shardc.compiler.errors import PlanError
from shardc.compiler.plan.entries import DataEntry
from shardc.compiler.plan.forwards import Forward
from shardc.compiler.plan.layout import counted, placement_code
from shardc.compiler.plan.match import Names, claims, did_you_mean, find, join
from shardc.compiler.plan.splits import split_module, split_parameter
from shardc.compiler.plan.wishes import Border, Style, Wish
from shardc.compiler.spec.spec import REPLICATE

BY_NAME, BY_MODULE, BY_ANCESTOR = 3, 2, 1


@dataclass(frozen=True)
class Claim:
    """What one wish asks of one tensor, under the name `via` and as part of a module; the highest rank wins."""

    wish: Wish
    rank: tuple[int, ...]
    via: str
    module: str = ""
    placement: Placement = REPLICATE  # while computing
    open: bool = False


class Asked:
    """What the wishes for one mesh dim ask of a model.

    modules: canonical name of each module that is named -> its wish, in the model's order. shares: the entries by
    which the mesh dim splits the batch; none for one of styles.

    Raises PlanError for a key of the wrong kind, two keys that disagree, and a style that does not fit.
    """

    def __init__(self, axis: str, wishes: Sequence[Wish], names: Names) -> None:
        self.axis, self.wishes, self.names = axis, wishes, names
        self.shares = [wish.asks for wish in wishes if isinstance(wish.asks, DataEntry)]
        self.unmatched: dict[str, str] = {}  # what matches nothing, as written -> the nearest name
        known: dict[str, Mapping[str, object]] = {"modules": names.modules, "tensors": names.tensors}
        keys = self._sorted(known)
        chosen = {kind: self._chosen(keys[kind], known[kind]) for kind in known}
        self.modules, self._tensors = chosen["modules"], chosen["tensors"]
        cut = [(fqn, wish) for fqn, wish in self.modules.items() if isinstance(wish.asks, Style) and wish.asks.split]
        self._splits = {fqn: split_module(names, fqn, wish) for fqn, wish in cut}
        self._left_alone = {wish: self._ignored(wish) for wish in wishes}

    def claim(self, tensor: str) -> Claim | None:
        """The claim that decides about a parameter or buffer, given by its canonical name: of those that do not leave
        it alone, if there are any. What an inner module ignores is then the outer one's.

        Raises PlanError where equals disagree, as two modules that share a parameter can.
        """
        found = list(self._claims(tensor))
        found = [claim for claim in found if tensor not in self._left_alone[claim.wish]] or found
        top = max((claim.rank for claim in found), default=())
        equals = [claim for claim in found if claim.rank == top]
        for other in equals[1:]:
            if other.placement != equals[0].placement:
                raise _two_ways(tensor, equals[0], other)
        return replace(equals[0], open=all(claim.open for claim in equals)) if equals else None

    def leaves(self, claim: Claim | None, tensor: str) -> bool:
        """Whether nothing is asked of a parameter, or its wish leaves it alone."""
        return claim is None or tensor in self._left_alone[claim.wish]

    def borders(self) -> Iterator[Border]:
        """What is said of values that cross the borders of modules."""
        for fqn, wish in self.modules.items():
            if isinstance(wish.asks, Style):
                _check_forward(wish, wish.asks, fqn, self.names.modules[fqn])
                split = self._splits.get(fqn)
                for border in split.borders(wish.asks) if split else wish.asks.borders:
                    yield replace(border, module=fqn, axis=wish.axis, key=wish.text)

    def counts(self) -> dict[tuple[str, str], int]:
        """(module, side) -> how many layouts are given for it."""
        styles = {fqn: wish.asks for fqn, wish in self.modules.items() if isinstance(wish.asks, Style)}
        return {(fqn, side): count for fqn, style in styles.items() for side, count in style.counts}

    def _sorted(self, known: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, Wish]]:
        """By kind and pattern, the wishes that name something of that kind; the rest is noted."""
        out: dict[str, dict[str, Wish]] = {kind: {} for kind in known}
        for wish in self.wishes:
            for pattern in wish.patterns:
                whole = join(glob.escape(wish.root), pattern)
                matched = {kind: found for kind, names in known.items() if (found := find(whole, names))}
                kind = next((kind for kind in wish.means if kind in matched), None)
                if kind is not None:
                    out[kind][whole] = wish
                elif matched:
                    raise self._wrong_kind(wish, **matched)
                else:
                    could = [name for kind in wish.means[::-1] for name in known[kind]]
                    single = f'{self.axis} = {type(wish.asks).__name__}("{pattern}")'
                    text = wish.place if isinstance(wish.asks, Style) else single
                    self.unmatched[text] = did_you_mean(pattern, could)
        return out

    def _chosen(self, keys: Mapping[str, Wish], known: Mapping[str, object]) -> dict[str, Wish]:
        """Canonical name of what is named -> its wish, in the model's order."""
        found, out = claims(keys, known), {}
        for name in (name for name in known if name in found):
            first = self.names.first(name)
            for wish in (keys[key] for key in found[name]):
                if out.setdefault(first, wish).asks != wish.asks:
                    also = f", which is {first}" if first != name else ""
                    pattern = f'a key that writes the name out wins over patterns: add "{name}"'
                    raise PlanError(
                        f"two keys match {name or 'the model'}{also}",
                        excerpt=f"{out[first].text}\n{wish.text}",
                        help="keep one of the two keys" if also else pattern,
                    )
        return out

    def _claims(self, tensor: str) -> Iterator[Claim]:
        """All that is asked of a tensor, under all of its names. Of buffers, only what names them."""
        if tensor in self._tensors:
            yield self._named(self._tensors[tensor], tensor)
        vias = self.names.of(self.names.tensors[tensor]) if tensor in self.names.parameters else []
        shared = [{module for module, _ in self.names.around(name)} for name in vias]
        for via, (module, inner) in [(name, place) for name in vias for place in self.names.around(name)]:
            wish = self.modules.get(module)
            if wish is not None:
                everywhere = all(module in modules for modules in shared)
                claim = Claim(wish, (BY_ANCESTOR, everywhere, via.count(".") - inner.count(".")), via, module)
                yield from self._inside(claim, inner) if isinstance(wish.asks, Style) else (claim,)

    def _inside(self, claim: Claim, inner: str) -> Iterator[Claim]:
        """What a module's style asks of a parameter inside it; that of a module further in may overrule it."""
        if "." not in inner:
            claim = replace(claim, rank=(BY_MODULE,))
        dims = self._splits[claim.module].dims if claim.module in self._splits else {}
        if inner in dims:
            dim = dims[inner]
            yield claim if dim is None else replace(claim, placement=self._fit(Shard(dim), claim), open=True)

    def _named(self, wish: Wish, via: str) -> Claim:
        """The claim of a wish on the tensor that it names."""
        assert isinstance(wish.asks, Style)
        if wish.asks.borders:
            raise PlanError(f"{wish.text} names the parameter {via}", help="this string is for a module")
        claim = Claim(wish, (BY_NAME,), via)
        placement = self._fit(split_parameter(wish.asks, self.names.tensors[via].ndim), claim)
        given = isinstance(wish.asks.split, Placement)
        return replace(claim, placement=placement, open=not given and placement != REPLICATE)

    def _fit(self, placement: Placement, claim: Claim) -> Placement:
        return counted(placement, self.names.tensors[claim.via].ndim, claim.via, claim.wish.text)

    def _ignored(self, wish: Wish) -> set[str]:
        """Canonical names of the parameters that an entry leaves alone: under all names inside what is ignored."""
        if isinstance(wish.asks, Style):
            return set()
        option, ignored = wish.asks.ignores, set[str]()
        by_module = option == "ignored_modules"
        known = self.names.modules if by_module else self.names.parameters
        for item in getattr(wish.asks, option):
            found = find(join(glob.escape(wish.root), item), known) if isinstance(item, str) else self.names.of(item)
            if not found and not isinstance(item, str):
                raise PlanError(
                    f"{self.axis}: {option} holds a {type(item).__name__} that the model does not have",
                    help=f"give a {'module' if by_module else 'parameter'} of this model, or a pattern of its names",
                )
            if not found:
                self.unmatched[f'{self.axis}: {option} "{item}"'] = did_you_mean(item, known)
            ignored |= {self.names.first(name) for name in found}
        names = self.names.parameters if ignored and by_module else ()
        outside = {self.names.first(n) for n in names if not ignored & {module for module, _ in self.names.around(n)}}
        return ignored | {self.names.first(name) for name in names} - outside

    def _wrong_kind(self, wish: Wish, modules: Sequence[str] = (), tensors: Sequence[str] = ()) -> PlanError:
        if tensors:
            owner, kind = tensors[0].rpartition(".")[0], type(wish.asks).__name__.replace("Style", "a style")
            return PlanError(
                f"{wish.text} names {tensors[0]}, a parameter or buffer",
                help=f'{kind} is for a module: write "{owner}", or give the parameter a placement',
            )
        own = [join(modules[0], name) for name in self.names.owned(modules[0])]
        return PlanError(
            f"{wish.text} names {modules[0] or 'the model'}, a module",
            help=f"a placement is for a parameter: {', '.join(own) or 'this module has none of its own'}",
        )


def _two_ways(tensor: str, first: Claim, other: Claim) -> PlanError:
    a, b = placement_code(first.placement), placement_code(other.placement)
    return PlanError(
        f"{first.via} and {other.via} are one tied parameter, laid out in two ways",
        excerpt=f"{first.via} is {a}: {first.wish.text}\n{other.via} is {b}: {other.wish.text}",
        help=f'decide by its name: "{tensor}": {a}',
    )


def _check_forward(wish: Wish, style: Style, fqn: str, module: nn.Module) -> None:
    """Lists of layouts and names of keyword arguments fit what forward takes, where its signature tells."""
    names = [border.index for border in style.borders if isinstance(border.index, str)]
    count = dict(style.counts).get("in")
    if count is None and not names:
        return
    forward, called = Forward.of(module.forward), fqn or "the model"
    # With layouts by name some of the required arguments may come by name too.
    if count is not None and (not forward.may_take(count) or (count < forward.required and not names)):
        least, most = forward.required, len(forward.positional)
        takes = f"{least} to {most}" if least < most else f"{most}"
        raise PlanError(
            f"{wish.place}: input_layouts has {count} layouts, "
            f"but forward of {called} takes {takes} positional arguments",
            help="give one layout for each, None for what is left alone",
        )
    for name in names:
        if not forward.may_have(name):
            raise PlanError(
                f"{wish.place}: input_kwarg_layouts names {name}, which forward of {called} does not take",
                help=did_you_mean(name, forward.names),
            )
