"""The factors that dims are made of, over a whole graph."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule

from shardc.compiler.infer.atoms import WHOLE, Atom, Atoms, unify
from shardc.compiler.ir.graph import placeholders
from shardc.compiler.ir.marks import MARK
from shardc.compiler.spec.mesh import Mesh
from tests.build import build, reshard

aten = torch.ops.aten
MESH = Mesh(tp=2)


def atoms(fn, **types: str) -> tuple[GraphModule, Atoms]:
    gm = build(fn, MESH, **types)
    return gm, Atoms(gm.graph.nodes)


def of(fn, name: str, dim: int, **types: str) -> list[str]:
    """The atoms of one dim of an input: sizes, with ! where something needs the atom whole."""
    gm, found = atoms(fn, **types)
    node = next(n for n in placeholders(gm) if n.name == name)
    return [f"{leaf.root().size}{'!' if leaf.root().needs else ''}" for leaf in found.of(node, dim)]


# ---- unify


def sizes(run: list[Atom]) -> list[int]:
    return [leaf.root().size for atom in run for leaf in atom.leaves()]


@pytest.mark.parametrize(
    ("left", "right", "common"),
    [
        ([12], [12], [12]),
        ([12], [3, 4], [3, 4]),
        ([3, 4], [12], [3, 4]),
        ([6, 4], [2, 12], [2, 3, 4]),
        ([2, 3, 4], [6, 4], [2, 3, 4]),
        ([1, 12, 1], [4, 3], [4, 3]),
        ([24], [2, 3, 4], [2, 3, 4]),
    ],
)
def test_two_runs_that_are_one_dim_have_common_factors(left: list[int], right: list[int], common: list[int]):
    a, b = [Atom(n) for n in left], [Atom(n) for n in right]
    assert unify(a, b)
    assert [n for n in sizes(a) if n != 1] == [n for n in sizes(b) if n != 1] == common


@pytest.mark.parametrize(("left", "right"), [([6], [4]), ([6, 2], [4, 3]), ([4], [4, 2]), ([0], [3])])
def test_runs_without_common_factors_are_not_unified(left: list[int], right: list[int]):
    assert not unify([Atom(n) for n in left], [Atom(n) for n in right])


def test_a_split_reaches_everything_that_was_joined_before():
    a, b, c = Atom(12), Atom(12), Atom(12)
    assert unify([a], [b]) and unify([b], [c]) and unify([c], [Atom(3), Atom(4)])
    assert sizes([a]) == sizes([b]) == [3, 4]


def test_what_is_needed_whole_is_needed_whole_by_all_that_is_joined_and_by_its_parts():
    a, b = Atom(12), Atom(12)
    b.needs = WHOLE
    assert unify([a], [b]) and unify([a], [Atom(3), Atom(4)])
    assert [leaf.root().needs for leaf in a.leaves()] == [WHOLE, WHOLE]


# ---- graphs


def test_a_dim_that_no_view_takes_apart_is_one_atom():
    assert of(lambda x, w: aten.relu(aten.mm(x, w)), "w", 1, x="f32[8, 6]", w="f32[6, 48]") == ["48"]


def test_views_behind_a_product_take_the_weights_columns_apart():
    def fn(x, w):
        return aten.view(aten.mm(x, w), [8, 3, 16])

    assert of(fn, "w", 1, x="f32[8, 6]", w="f32[6, 48]") == ["3", "16"]
    assert of(fn, "w", 0, x="f32[8, 6]", w="f32[6, 48]") == ["6"]


def test_a_product_cut_in_thirds_keeps_the_thirds_whole():
    def fn(x, w):
        q = aten.split_with_sizes(aten.mm(x, w), [48, 48, 48], 1)[0]
        return aten.view(q, [8, 3, 16])

    assert of(fn, "w", 1, x="f32[8, 6]", w="f32[6, 144]") == ["3!", "3", "16"]


def test_a_softmax_needs_its_dim_whole_or_joined():
    def fn(x):
        return aten.cumsum(aten.view(x, [8, 3, 16]), 2)

    assert of(fn, "x", 1, x="f32[8, 48]")[0] == "3"


def test_marks_and_reshards_pass_atoms_on():
    def fn(x):
        return aten.view(reshard(MARK(x, "a|in|0"), "[8, 48]"), [8, 3, 16])

    assert of(fn, "x", 1, x="f32[8, 48]") == ["3", "16"]


def test_an_operator_without_a_rule_needs_its_operands_whole():
    def fn(x):
        return aten.frobenius_norm.dim(aten.view(x, [8, 3, 16]), [1])

    assert of(fn, "x", 1, x="f32[8, 48]") == ["3!", "16!"]


def test_dims_of_size_one_have_no_atoms():
    assert of(lambda x: aten.relu(x), "x", 0, x="f32[1, 4]") == []
