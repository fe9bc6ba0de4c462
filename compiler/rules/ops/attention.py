"""Scaled dot product attention: batch and heads free; query length too, on the CPU.

Keys' length and the dims contracted in a product stay whole. With grouped heads the queries' are `(g r)`,
the keys' and values' `g`. Gradients of keys and values are pending over r and the query length. Under a causal mask
a rank's queries see keys up to its last one: those behind it are cut off, and a mask hides what its own block has
above the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from shardc.compiler.rules.notation import apart, broadcast, line
from shardc.compiler.rules.site import Site
from shardc.compiler.rules.steps import get
from shardc.compiler.rules.table import OpRule, parse, rule, tensors_in

aten = torch.ops.aten

# operator -> what it returns: like the queries (q), keys (k), values (v), output (o), a number per query and
# head (n), mask (m); anything else is of no shape that a rule could split
FORWARD = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: "on",
    aten._scaled_dot_product_flash_attention.default: "on-------",
    aten._scaled_dot_product_efficient_attention.default: "on--",
    aten._scaled_dot_product_cudnn_attention.default: "on-------",
}
BACKWARD = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: "qkv",
    aten._scaled_dot_product_flash_attention_backward.default: "qkv",
    aten._scaled_dot_product_efficient_attention_backward.default: "qkvm",
    aten._scaled_dot_product_cudnn_attention_backward.default: "qkv",
}
# and what an argument is, by its name in their schemas
ARGUMENTS = {
    "query": "q", "key": "k", "value": "v", "out": "o", "grad_out": "o", "grad_out_": "o", "logsumexp": "n",
    "attn_mask": "m", "attn_bias": "m",
}  # fmt: skip
# Others are told the query length as a number, or keep more rows per head than there are queries, and take
# no empty batch.
ANY_SIZE = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)


class _Call:
    """One call in factors."""

    def __init__(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.op, self.schema = op, [a.name for a in op._schema.arguments]
        self.given = dict(zip(self.schema, args, strict=False)) | dict(kwargs)
        q, k = self.given["query"], self.given["key"]
        self.grouped = q.shape[1] != k.shape[1]
        self.heads = "(g r)" if self.grouped else "g"
        self.scores = (*q.shape[:3], k.shape[2])
        self.causal = bool(self.given.get("is_causal", False))
        queries = op in ANY_SIZE and not (self.causal and self.given.get("attn_mask") is not None)
        self.cuts_keys = self.scores[2] <= self.scores[3]  # every rank's last query has a key
        self.free = ["b", "g", *(["r"] if self.grouped else []), *(["q"] if queries else [])]

    def names(self, role: str, t: Any, label: str) -> list[str]:
        """The dims of a tensor; dims of its own where the role does not tell them."""
        rest = [f"{label}.{d}" for d in range(t.dim())]
        match role:
            case "q" | "o":
                return ["b", self.heads, "q", "e" if role == "q" else "f"]
            case "k" | "v":
                return ["b", "g", "k", "e" if role == "k" else "f"]
            case "m":
                return broadcast(t.shape, self.scores, ["b", self.heads, "q", "k"])
            case "n" if t.dim() > 2:
                return ["b", self.heads, "q" if t.shape[2] == self.scores[2] else rest[2], *rest[3:]]
        return rest

    def rule(self, roles: str, results: Sequence[Any], **options: Any) -> OpRule:
        left = [
            self.names(ARGUMENTS.get(name, "-"), t, f"x{i}")
            for i, (name, value) in enumerate(self.given.items())
            for t in tensors_in(value)
        ]
        right = [self.names(roles[i], t, f"y{i}") for i, t in enumerate(results)]
        split = {*self.free, self.heads, "1"}
        whole = dict.fromkeys(n for tensor in (*left, *right) for n in tensor if n not in split)
        few = [n for n in self.free if n in ("r", "q") or (n == "b" and self.op not in ANY_SIZE)]
        return parse(
            line(left, right), whole=" ".join(whole), nonempty=" ".join(few),
            plain="q" if self.causal and "q" in self.free else "", localize=_localized(self, roles), **options,
        )  # fmt: skip


def _localized(call: _Call, roles: str) -> Callable[[Site], Any]:
    """The call on what a rank holds: of a causal mask, its own rows; and where a rank may have no heads, of which
    kernels die, every rank adds one of zeros and drops it from the results."""

    def localize(site: Site) -> Any:
        given = dict(zip(call.schema, site.args, strict=False)) | dict(site.kwargs)
        cut = call.causal and site.split("q")
        if cut:
            given |= _own_rows(call, site, given)
        lone = site.split("g") and site.may_be_empty("g")
        if lone:
            given = {name: _with_head(call, site, name, x) for name, x in given.items()}
        args = [given.pop(name) for name in call.schema[: len(site.args)]]
        made = site.call(call.op, *args, **given)
        keys = cut and call.cuts_keys and "k" in roles
        return tuple(_whole(site, made, i, role, lone, keys) for i, role in enumerate(roles)) if lone or keys else made

    return localize


def _own_rows(call: _Call, site: Site, given: Mapping[str, Any]) -> dict[str, Any]:
    """What changes where a rank holds some queries of a causal call: keys up to its last query, and a mask."""
    keys, q = call.scores[3], call.given["query"]
    stop = site.stop("q") if call.cuts_keys else keys
    own: dict[str, Any] = {"is_causal": False}
    if call.cuts_keys:
        own |= {name: site.call(aten.slice.Tensor, given[name], 2, 0, stop) for name in ("key", "value")}
    options = {"dtype": q.dtype, "device": q.device, "pin_memory": False}
    hidden = site.call(aten.full.default, [site.size("q"), stop], -math.inf, **options)
    return own | {"attn_mask": site.call(aten.triu.default, hidden, site.start("q") + 1)}


def _with_head(call: _Call, site: Site, name: str, x: Any) -> Any:
    """An argument with one head more, of zeros."""
    given, role = call.given.get(name), ARGUMENTS.get(name, "-")
    names = call.names(role, given, "") if isinstance(given, torch.Tensor) else []
    for at, n in enumerate(names):
        if n in (call.heads, "g"):
            more = 1 if role in "kv" or not call.grouped else site.size("r")
            return site.call(aten.constant_pad_nd.default, x, [0, 0] * (len(names) - 1 - at) + [0, more], 0)
    return x


def _whole(site: Site, made: Any, i: int, role: str, lone: bool, keys: bool) -> Any:
    """The i-th result without a head that was added, and with zeros for keys that were cut off."""
    x = get(site, made, i)
    if lone and role != "-":
        x = site.call(aten.narrow.default, x, 1, 0, site.result_shape(i)[1])
    if keys and role in "kv":
        x = site.call(aten.constant_pad_nd.default, x, [0, 0, 0, site.result_shape(i)[2] - site.stop("q")], 0)
    return x


def _build(op: Any, roles: str, backward: bool) -> Callable[..., OpRule]:
    def build(*args: Any, results: Any, **kwargs: Any) -> OpRule:
        call = _Call(op, args, kwargs)
        if call.given.get("dropout_p", 0.0) > 0 or len(results) > len(roles):
            return apart(tensors_in(args, kwargs), results)
        if not backward:
            # what is left of the results is about dropout, and the same on every rank
            return call.rule(roles, results, joined=" ".join(call.free))
        wanted = call.given.get("grad_input_mask", [True] * len(roles))
        if not all(wanted[:3]):
            return apart(tensors_in(args, kwargs), results, linear="0")
        return call.rule(roles if wanted[-1] else roles[:3], results, sum=" ".join(call.free), linear="0")

    return build


for _table, _backward in ((FORWARD, False), (BACKWARD, True)):
    for _op, _roles in _table.items():
        rule(_op)(_build(_op, _roles, _backward))
