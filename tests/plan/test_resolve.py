"""A plan on a model and a mesh: which key wins, how mesh dims compose, what is warned of and what refused."""

import re
import warnings

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
)
from torch.distributed.tensor.placement_types import _StridedShard

from shardc import FullyShard, Mesh, Plan, PlanError, Replicated
from shardc.compiler.plan.resolve import mesh_dims, resolve
from shardc.compiler.plan.resolved import Resolved

TP, DP, BOTH = Mesh(tp=2), Mesh(dp=2), Mesh(dp=2, tp=4)


class Block(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.w1, self.w2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class Model(nn.Module):
    """Two blocks between an embedding and a head that share a weight."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(13, 8)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.emb.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.register_buffer("mask", torch.zeros(6, 6))


def split(found: Resolved) -> dict[str, str]:
    """The parameters that are split at rest."""
    return {fqn: layout.stored.text() for fqn, layout in found.params.items() if not layout.stored.is_whole}


def local(found: Resolved, axis: str = "dp") -> set[str]:
    """The parameters whose gradients are not reduced over a mesh dim."""
    return {fqn for fqn, layout in found.params.items() if axis in layout.local}


def refusals(*plans: object, mesh: Mesh = TP, model: type[nn.Module] = Model) -> str:
    texts = []
    for plan in plans:
        with pytest.raises(PlanError) as caught:
            resolve(plan, model(), mesh)
        texts.append(re.sub(r"\.py:\d+", ".py:N", str(caught.value)))
    return "\n\n".join(texts) + "\n"


def test_every_parameter_once_in_order_with_its_other_names():
    model = Model()
    found = resolve({"emb": "rowwise"}, model, TP)
    assert list(found.params) == [name for name, _ in model.named_parameters()]
    assert found.params["emb.weight"].aliases == ("head.weight",)
    assert found.layout("head.weight") is found.layout("emb.weight") is found.params["emb.weight"]
    layout = found.params["layers.0.w1.weight"]
    assert (layout.shape, layout.dtype, layout.nbytes, layout.requires_grad) == (
        (32, 8),
        torch.float32,
        1024,
        True,
    )


@pytest.mark.parametrize("key", ["layers.*.w1", "layers.[01].w1", "l*.?.w1"])
def test_patterns_mean_the_names_written_out(key: str):
    full = {f"layers.{i}.w1": ColwiseParallel() for i in range(2)}
    assert split(resolve({key: ColwiseParallel()}, Model(), TP)) == split(resolve(full, Model(), TP))


def test_a_model_on_meta_will_do():
    with torch.device("meta"):
        model = Model()
    assert split(resolve({"layers.*.w1": "colwise"}, model, TP)).keys() == {
        f"layers.{i}.w1.{name}" for i in range(2) for name in ("weight", "bias")
    }


def test_a_tp_plan_of_a_published_model():
    plan = {
        "emb": "embedding_rowwise",
        "layers.*.w1": "colwise",
        "layers.*.w2": "rowwise",
        "layers.*.norm": "replicated_with_grad_allreduce",
        "head": "colwise_gather_output",
    }
    found = resolve(plan, Model(), TP)
    assert split(found) == {
        "emb.weight": "[13@tp, 8]",
        **{f"layers.{i}.w1.weight": "[32@tp, 8]" for i in range(2)},
        **{f"layers.{i}.w1.bias": "[32@tp]" for i in range(2)},
        **{f"layers.{i}.w2.weight": "[8, 32@tp]" for i in range(2)},
    }
    assert found.params["layers.1.norm.bias"].keys == {"tp": 'tp["layers.*.norm"] = "replicated_with_grad_allreduce"'}


# ---- which key wins


def test_a_written_out_key_wins_over_a_pattern():
    found = resolve({"layers.*.w1": "colwise", "layers.1.w1": "rowwise"}, Model(), TP)
    assert split(found)["layers.0.w1.weight"] == "[32@tp, 8]"
    assert split(found)["layers.1.w1.weight"] == "[32, 8@tp]"


def test_two_patterns_that_agree_are_one():
    found = resolve({"layers.*.w1": ColwiseParallel(), "layers.0.*1": ColwiseParallel()}, Model(), TP)
    assert len([b for b in found.borders if b.module == "layers.0.w1"]) == 2


def test_the_name_of_a_parameter_wins_over_its_module():
    found = resolve({"layers.*.w1": "colwise", "layers.0.w1.bias": Replicate()}, Model(), TP)
    assert "layers.0.w1.bias" not in split(found) and "layers.1.w1.bias" in split(found)


def test_a_placement_closes_what_a_style_leaves_open():
    found = resolve({"layers.*.w1": "colwise", "layers.0.w1.weight": Shard(-2)}, Model(), TP)
    assert split(found)["layers.0.w1.weight"] == "[32@tp, 8]"
    assert found.params["layers.0.w1.weight"].open == frozenset()
    assert found.params["layers.1.w1.weight"].open == {"tp"}


def test_a_style_inside_wins_over_one_around():
    found = resolve({"layers.0": SequenceParallel(), "layers.0.w1": "colwise"}, Model(), TP)
    assert split(found).keys() == {"layers.0.w1.weight", "layers.0.w1.bias"}
    assert found.params["layers.0.w2.bias"].keys == {"tp": 'tp["layers.0"] = SequenceParallel()'}


def test_a_style_on_a_projection_wins_over_that_of_its_attention():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    found = resolve({"attn": ColwiseParallel(), "attn.out_proj": ColwiseParallel()}, model, TP)
    assert split(found)["attn.out_proj.weight"] == "[8@tp, 8]"


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a


def test_a_shared_module_is_one_module():
    found = resolve({"b": ColwiseParallel()}, Twice(), TP)
    assert found.marked == ("a",)
    assert split(found)["a.weight"] == "[4@tp, 4]"


def test_keys_that_disagree_are_refused():
    assert_expected_inline(
        refusals(
            {"layers.*.w1": "colwise", "layers.0.*1": "rowwise"},
            {"layers.*.w1.bias": Shard(0), "layers.0.w1.*s": Replicate()},
            {"emb": "rowwise", "head": RowwiseParallel()},
            {"emb.weight": Shard(1), "head.weight": Shard(0)},
        )
        + "\n"
        + refusals({"a": "colwise", "b": "rowwise"}, model=Twice),
        """\
plan error: two keys match layers.0.w1
  --> test_resolve.py:N
   | tp["layers.*.w1"] = "colwise"
   | tp["layers.0.*1"] = "rowwise"
   = help: a key that writes the name out wins over patterns: add "layers.0.w1"

plan error: two keys match layers.0.w1.bias
  --> test_resolve.py:N
   | tp["layers.*.w1.bias"] = Shard(0)
   | tp["layers.0.w1.*s"] = Replicate()
   = help: a key that writes the name out wins over patterns: add "layers.0.w1.bias"

plan error: emb.weight and head.weight are one tied parameter, laid out in two ways
  --> test_resolve.py:N
   | emb.weight is Shard(0): tp["emb"] = "rowwise"
   | head.weight is Shard(1): tp["head"] = RowwiseParallel()
   = help: decide by its name: "emb.weight": Shard(0)

plan error: two keys match head.weight, which is emb.weight
  --> test_resolve.py:N
   | tp["emb.weight"] = Shard(1)
   | tp["head.weight"] = Shard(0)
   = help: keep one of the two keys

plan error: two keys match b, which is a
  --> test_resolve.py:N
   | tp["a"] = "colwise"
   | tp["b"] = "rowwise"
   = help: keep one of the two keys
""",
    )


def test_a_tied_parameter_may_be_laid_out_by_both_or_one_of_its_modules():
    both = resolve({"emb": RowwiseParallel(), "head": ColwiseParallel()}, Model(), TP)
    one = resolve({"head": ColwiseParallel()}, Model(), TP)
    decided = resolve({"emb": ColwiseParallel(), "head": ColwiseParallel(), "emb.weight": Shard(0)}, Model(), TP)
    for found in (both, one, decided):
        assert split(found) == {"emb.weight": "[13@tp, 8]"}


def test_keys_of_the_wrong_kind_are_refused():
    assert_expected_inline(
        refusals(
            {"layers.0.w1": Shard(0)},
            {"layers.*": Shard(0)},
            {"emb.weight": ColwiseParallel()},
            {"emb.weight": "all_reduce"},
            {"emb.weight": Shard(2)},
            {"emb.weight": Shard(-3)},
            {"scale": Shard(0)},
            {"emb.weight": _StridedShard(0, split_factor=2)},
            Plan(tp={"layers.*": ColwiseParallel()}),
            Plan(tpp={"layers.*": ColwiseParallel()}),
        ),
        """\
plan error: tp["layers.0.w1"] = Shard(0) names layers.0.w1, a module
  --> test_resolve.py:N
   = help: a placement is for a parameter: layers.0.w1.weight, layers.0.w1.bias

plan error: tp["layers.*"] = Shard(0) names layers.0, a module
  --> test_resolve.py:N
   = help: a placement is for a parameter: this module has none of its own

plan error: tp["emb.weight"] = ColwiseParallel() names emb.weight, a parameter or buffer
  --> test_resolve.py:N
   = help: a style is for a module: write "emb", or give the parameter a placement

plan error: tp["emb.weight"] = "all_reduce" names the parameter emb.weight
  --> test_resolve.py:N
   = help: this string is for a module

plan error: emb.weight is split on dim 2, but has 2 dims
  --> test_resolve.py:N
   | tp["emb.weight"] = Shard(2)
   = help: name one of its dims

plan error: emb.weight is split on dim -3, but has 2 dims
  --> test_resolve.py:N
   | tp["emb.weight"] = Shard(-3)
   = help: name one of its dims

plan error: scale is split on dim 0, but has 0 dims
  --> test_resolve.py:N
   | tp["scale"] = Shard(0)
   = help: leave a scalar whole: Replicate()

plan error: _S(0, 2) over tp does not fit a dim of layout 13
  --> test_resolve.py:N
   | tp["emb.weight"] = _StridedShard(0, split_factor=2)
   = help: lay out emb.weight in another way

plan error: tp["layers.*"] = ColwiseParallel() names layers.0, a Block with no parameters of its own
  --> test_resolve.py:N
   = help: name modules inside it: layers.0.w1, layers.0.w2

plan error: the plan names the mesh dim tpp, but the mesh has tp
  --> test_resolve.py:N
   = help: the nearest name is "tp"
""",
    )


def test_a_lazy_parameter_is_refused():
    with pytest.raises(PlanError, match="weight has no shape yet"):
        resolve({"": "colwise"}, nn.LazyLinear(3), TP)


# ---- mesh dims together


@pytest.mark.parametrize("first", ["dp", "tp"])
def test_what_is_fully_sharded_lies_inside_of_what_a_style_splits(first: str):
    entries = {"dp": FullyShard(), "tp": {"layers.*.w1": ColwiseParallel(), "layers.*.w2": "rowwise"}}
    plan = Plan(**dict(sorted(entries.items(), reverse=first == "tp")))
    found = resolve(plan, Model(), BOTH)
    assert next(iter(found.params["layers.0.w1.weight"].keys)) == first
    w1, w2 = found.params["layers.0.w1.weight"], found.params["layers.0.w2.weight"]
    assert (w1.stored.text(), w1.compute.text(), w1.kept) == ("[32@tp.dp, 8]", "[32@tp, 8]", w1.stored)
    assert (w2.stored.text(), w2.compute.text()) == ("[8@dp, 32@tp]", "[8, 32@tp]")
    assert w1.open == {"tp"} and w1.unit == {"dp": ""}


def test_two_styles_on_one_dim_nest_in_plan_order():
    plan = Plan(b={"layers.*.w1": "colwise"}, a={"layers.*.w1.weight": Shard(0)})
    found = resolve(plan, Model(), Mesh(a=2, b=2))
    assert split(found)["layers.0.w1.weight"] == "[32@b.a, 8]"
    assert found.params["layers.0.w1.weight"].open == {"b"}


def test_hybrid_sharding():
    plan = Plan(outer=Replicated(), inner=FullyShard("layers.*"), tp={"layers.*.w1": ColwiseParallel()})
    found = resolve(plan, Model(), Mesh(outer=2, inner=2, tp=2))
    assert found.data_axes == ("outer", "inner")
    assert split(found)["layers.0.w1.bias"] == "[32@tp.inner]"
    assert found.params["layers.0.norm.bias"].keys == {
        "outer": "outer = Replicated()",
        "inner": 'inner = FullyShard("layers.*")',
    }


# ---- data parallel


def test_units_are_the_matches_and_the_root_takes_the_rest():
    found = resolve(Plan(dp=FullyShard("layers.*", "layers.1.w2")), Model(), DP)
    units = {fqn: layout.unit["dp"] for fqn, layout in found.params.items()}
    assert units["layers.0.w1.bias"] == "layers.0" and units["layers.1.w2.bias"] == "layers.1.w2"
    assert units["emb.weight"] == "" == units["scale"]
    assert not local(found)


def test_without_patterns_the_root_takes_all():
    found = resolve(FullyShard(), Model(), DP)
    assert {layout.unit["dp"] for layout in found.params.values()} == {""}


def test_a_parameter_tied_across_units_goes_to_one_that_holds_both():
    found = resolve(Plan(dp=FullyShard("emb", "head")), Model(), DP)
    assert found.params["emb.weight"].unit == {"dp": ""}


def test_scalars_stay_whole():
    scale = resolve(FullyShard(), Model(), DP).params["scale"]
    assert scale.stored.is_whole and scale.notes == ("a scalar stays whole over dp",)


def test_placement_chooses_the_dim():
    largest = FullyShard(placement=lambda p: Shard(max(range(p.ndim), key=lambda d: p.shape[d])))
    found = resolve(largest, Model(), DP)
    assert split(found)["layers.0.w2.weight"] == "[8, 32@dp]"
    assert split(found)["layers.0.w1.weight"] == "[32@dp, 8]"
    assert split(found)["layers.0.w1.bias"] == "[32@dp]"


def test_placement_may_leave_a_parameter_to_the_default_and_count_from_the_end():
    found = resolve(FullyShard(placement=lambda p: Shard(-1) if p.ndim > 1 else None), Model(), DP)
    assert split(found)["layers.0.w1.weight"] == "[32, 8@dp]"
    assert split(found)["layers.0.w1.bias"] == "[32@dp]"


@pytest.mark.parametrize("after, kept", [(True, "dp"), (False, ""), (2, "dp/2"), (1, ""), (4, "dp")])
def test_resharding_to_a_number_of_ranks(after: bool | int, kept: str):
    found = resolve(FullyShard("layers.*", reshard_after_forward=after), Model(), Mesh(dp=4))
    layout = found.params["layers.0.w1.bias"]
    assert (layout.stored.text(), layout.compute.text()) == ("[32@dp]", "[32]")
    assert layout.kept.text() == (f"[32@{kept}]" if kept else "[32]")


def test_units_name_their_own_parameters():
    found = resolve(FullyShard("layers.*"), Model(), Mesh(dp=4))
    first = [name for name in found.params if name.startswith("layers.0.")]
    rest = [name for name in found.params if not name.startswith("layers.")]
    assert list(found.of_units(["layers.0"])) == first and list(found.of_units([""])) == rest
    assert set(found.of_units(["", "layers.[01]"])) == set(found.params)
    with pytest.raises(PlanError, match="no unit matches 'layers.0.w1'"):
        found.of_units(["layers.0.w1"])  # it lies in one


def test_where_there_are_no_units_modules_name_all_they_hold():
    found = resolve(Replicated(), Model(), Mesh(dp=4))
    assert found.of_units([""]) == tuple(found.params)
    assert found.of_units(["layers.*.w1"]) == tuple(n for n in found.params if ".w1." in n)


def test_options_of_data_parallel_are_kept():
    found = resolve(Replicated(bucket_mb=0.5, reduce_dtype=torch.bfloat16), Model(), DP)
    assert found.bucket_bytes == {"dp": 512 * 1024}
    assert found.reduce_dtype == {"dp": torch.bfloat16}
    assert split(found) == {}


def test_parameters_outside_of_what_is_replicated_are_left_alone():
    found = resolve(Replicated(("layers.*", "emb"), ignored_modules="layers.1.w1"), Model(), DP)
    assert local(found) == {"scale", "layers.1.w1.weight", "layers.1.w1.bias"}


def test_a_tied_parameter_is_left_alone_only_where_all_its_modules_are():
    assert not local(resolve(Replicated(ignored_modules="emb"), Model(), DP))
    both = Replicated(ignored_modules=("emb", "head"))
    assert local(resolve(both, Model(), DP)) == {"emb.weight"}


def test_ignored_parameters_stay_whole_and_local():
    found = resolve(FullyShard(ignored_params="layers.*.norm.*"), Model(), DP)
    ignored = {f"layers.{i}.norm.{name}" for i in range(2) for name in ("weight", "bias")}
    assert local(found) == ignored and not ignored & split(found).keys()


def test_data_parallel_that_does_not_fit_is_refused():
    assert_expected_inline(
        refusals(
            Replicated(ignored_modules=[nn.Linear(2, 2)]),
            FullyShard(ignored_params=[nn.Parameter(torch.zeros(2))]),
            FullyShard(reshard_after_forward=3),
            FullyShard(placement=lambda p: Shard(2)),
            FullyShard(placement=lambda p: Replicate()),  # type: ignore[arg-type, return-value]
            mesh=DP,
        ),
        """\
plan error: dp: ignored_modules holds a Linear that the model does not have
  --> test_resolve.py:N
   = help: give a module of this model, or a pattern of its names

plan error: dp: ignored_params holds a Parameter that the model does not have
  --> test_resolve.py:N
   = help: give a parameter of this model, or a pattern of its names

plan error: dp: reshard_after_forward is 3 ranks, but there are 2
  --> test_resolve.py:N
   = help: reshard_after_forward is True, False or a number that divides them

plan error: emb.weight is split on dim 2, but has 2 dims
  --> test_resolve.py:N
   | FullyShard(placement=<lambda>)
   = help: name one of its dims

plan error: FullyShard(placement=<lambda>): placement gives Replicate() for emb.weight
  --> test_resolve.py:N
   = help: return Shard(d) for one of its dims, or None for Shard(0)
""",
    )


# ---- borders


def test_by_default_the_first_dim_is_the_batch():
    found = resolve(Plan(dp=Replicated(), inner=FullyShard()), Model(), Mesh(dp=2, inner=2))
    batch = {"dp": Shard(0), "inner": Shard(0)}
    assert found.root_layout("in", "x", 2) == batch == found.root_layout("out", "output", 1)
    assert found.root_layout("in", "x", 0) == {}
    assert resolve({"emb": "rowwise"}, Model(), TP).root_layout("in", "x", 2) == {}


def test_borders_come_in_the_order_of_the_plan_and_the_model():
    plan = Plan(b={"layers.*.w2": "rowwise", "emb": "rowwise"}, a={"layers.0.w1": "colwise"})
    found = resolve(plan, Model(), Mesh(a=2, b=2))
    assert [(b.axis, b.module, b.side) for b in found.borders] == [
        *(("b", m, side) for m in ("emb", "layers.0.w2", "layers.1.w2") for side in ("in", "out")),
        *(("a", "layers.0.w1", side) for side in ("in", "out")),
    ]
    assert found.marked == ("emb", "layers.0.w1", "layers.0.w2", "layers.1.w2")
    assert found.positional["layers.0.w1"] == ("input",)
    assert found.borders[0].key == 'b["emb"] = "rowwise"'


def test_constraints_are_read_over_the_mesh():
    found = resolve({"emb": "rowwise"}, Model(), TP)
    wished = (("tp", Shard(1), False, "constrain"),)
    assert found.wished("constrain|S(1)") == wished == found.wished("constrain|tp=S(1)")
    both = resolve(Plan(dp=Replicated(), tp={"emb": "rowwise"}), Model(), BOTH)
    assert both.wished("constrain|tp=S(1)") == (("dp", Replicate(), False, "constrain"), *wished)
    with pytest.raises(PlanError, match="the layout given to constrain is Shard"):
        both.wished("constrain|S(1)")


def test_a_buffer_may_have_a_placement():
    found = resolve({"mask": Shard(1)}, Model(), TP)
    assert found.buffers["mask"].stored.text() == "[6, 6@tp]" and "mask" not in found.params


# ---- what is odd


def test_keys_that_match_nothing_are_named_with_the_nearest_name():
    plan = {"layers.*.w3": "colwise", "emb.wieght": Shard(0), "hed": ColwiseParallel(), "emb": "rowwise"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = resolve(plan, Model(), TP)
    assert_expected_inline(
        "".join(f"{w.message}\n" for w in caught),
        """\
tp["layers.*.w3"] matches nothing; the nearest name is "layers.0.w1"
tp["emb.wieght"] matches nothing; the nearest name is "emb.weight"
tp["hed"] matches nothing; the nearest name is "head"
""",
    )
    assert found.unmatched == ('tp["layers.*.w3"]', 'tp["emb.wieght"]', 'tp["hed"]')
    assert {w.filename for w in caught} == {__file__} and {w.category for w in caught} == {UserWarning}
    assert split(found) == {"emb.weight": "[13@tp, 8]"}


def test_patterns_of_data_parallel_that_match_nothing_are_named_too():
    with pytest.warns(UserWarning) as caught:
        resolve(Plan(dp=FullyShard("layer.*", ignored_params="scales")), Model(), DP)
        resolve(Plan(dp=Replicated(ignored_modules="heads")), Model(), DP)
    assert_expected_inline(
        "".join(f"{w.message}\n" for w in caught),
        """\
dp = FullyShard("layer.*") matches nothing; the nearest name is "layers.0"
dp: ignored_params "scales" matches nothing; the nearest name is "scale"
dp: ignored_modules "heads" matches nothing; the nearest name is "head"
""",
    )


def test_strict_refuses_a_key_that_matches_nothing():
    with pytest.raises(PlanError, match='tp\\["hed"\\] matches nothing') as caught:
        resolve({"hed": ColwiseParallel()}, Model(), TP, strict=True)
    assert caught.value.help == 'the nearest name is "head"'


@pytest.mark.parametrize("plan", [{}, Plan(), Plan(tp={}), None])
def test_an_empty_plan_is_warned_of(plan: object):
    with pytest.warns(UserWarning, match="the plan is empty: the model runs replicated"):
        found = resolve(plan, Model(), TP)
    assert split(found) == {} and found.borders == () and found.data_axes == ()


def test_no_plan_on_one_rank_is_nothing_odd():
    assert resolve(None, Model(), Mesh(tp=1)).warnings == ()


def test_a_mesh_dim_without_a_plan_is_warned_of():
    with pytest.warns(UserWarning, match="nothing is planned for the mesh dim dp: its ranks all do the same"):
        resolve(Plan(tp={"emb": "rowwise"}), Model(), BOTH)
    assert resolve(Plan(tp={"emb": "rowwise"}), Model(), Mesh(dp=1, tp=2)).warnings == ()


def test_errors_point_at_the_plan_or_at_the_call():
    with pytest.raises(PlanError) as planned:
        resolve(Plan(tp={"layers": "colwise"}), Model(), TP)
    with pytest.raises(PlanError) as bare:
        resolve({"layers": "colwise"}, Model(), TP)
    for caught in (planned, bare):
        assert re.fullmatch(r"test_resolve\.py:\d+", caught.value.where)


def test_mesh_dims_of_a_plan_and_of_annotations():
    import shardc

    model = shardc.fully_shard(Model(), mesh_dim="dp")
    assert mesh_dims(Plan(tp={}), model) == ("tp", "dp")
    assert mesh_dims({"emb": "rowwise"}, Model()) == () == mesh_dims(None, Model())
