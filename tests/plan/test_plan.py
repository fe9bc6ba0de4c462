"""What a plan may say, and the errors for what it may not."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel
from torch.distributed.tensor.placement_types import _StridedShard

from shardc import FullyShard, Layout, Plan, PlanError, Precision, Replicated
from shardc.compiler.plan.layout import as_layout
from shardc.compiler.plan.plan import as_plan


def refusals(*makers) -> str:
    """The whole texts of the errors, one paragraph each."""
    texts = []
    for make in makers:
        with pytest.raises(PlanError) as caught:
            make()
        texts.append(str(caught.value))
    return "\n\n".join(texts)


def test_a_plan_writes_itself():
    plan = Plan(
        dp=FullyShard("layers.*", reshard_after_forward=False),
        tp={"layers.*.wq": ColwiseParallel(), "layers.*.wo": "rowwise", "emb.weight": Shard(0)},
    )
    assert repr(plan) == (
        'Plan(dp=FullyShard("layers.*", reshard_after_forward=False), '
        'tp={"layers.*.wq": ColwiseParallel(), "layers.*.wo": "rowwise", "emb.weight": Shard(0)})'
    )
    assert repr(Plan(tp=RowwiseParallel(output_layouts=Shard(1)))) == (
        'Plan(tp={"": RowwiseParallel(output_layouts=Shard(1))})'
    )


@pytest.mark.parametrize(
    "entry, text",
    [
        (Replicated(), "Replicated()"),
        (Replicated("a", bucket_mb=1), 'Replicated("a", bucket_mb=1)'),
        (Replicated(("a", "b"), ignored_modules="c"), 'Replicated("a", "b", ignored_modules=["c"])'),
        (Replicated(ignored_modules=[nn.ReLU()]), "Replicated(ignored_modules=[a ReLU])"),
        (FullyShard(), "FullyShard()"),
        (
            FullyShard("a", "b", reduce_dtype=torch.bfloat16),
            'FullyShard("a", "b", reduce_dtype=torch.bfloat16)',
        ),
        (FullyShard(ignored_params=["x"]), 'FullyShard(ignored_params=["x"])'),
    ],
)
def test_entries_write_themselves_without_their_defaults(entry, text: str):
    assert repr(entry) == text


def test_what_is_no_entry_is_refused():
    assert_expected_inline(
        refusals(
            lambda: Plan(tp=7),
            lambda: Plan(tp=None),
            lambda: Plan(tp=Shard(0)),
            lambda: Plan(tp=ColwiseParallel),
            lambda: Plan(tp=nn.Linear),
            lambda: Plan(dp=FullyShard),
            lambda: Plan(tp={3: ColwiseParallel()}),
            lambda: Plan(tp={"a": FullyShard()}),
            lambda: Plan(tp={"a": nn.Linear(1, 1)}),
            lambda: Plan(tp={"a.weight": Partial()}),
        ),
        """\
plan error: tp is 7, which is no style
   = help: write a style of torch.distributed.tensor.parallel or a string of tp_plan

plan error: tp is None, which is no style
   = help: write a style of torch.distributed.tensor.parallel or a string of tp_plan

plan error: tp = Shard(0) does not say for which parameter
   = help: write tp={"weight": Shard(0)}

plan error: tp is the class ColwiseParallel
   = help: write ColwiseParallel()

plan error: tp is <class 'torch.nn.modules.linear.Linear'>, which is no style
   = help: write a style of torch.distributed.tensor.parallel or a string of tp_plan

plan error: dp is the class FullyShard
   = help: write FullyShard()

plan error: tp has the key 3
   = help: a key is a pattern over module or parameter names

plan error: tp["a"] is FullyShard()
   = help: FullyShard, Replicated and dicts are for a whole mesh dim: Plan(dp=FullyShard(...))

plan error: tp["a"] is Linear(in_features=1, out_features=1, bias=True), which is no style
   = help: write a style of torch.distributed.tensor.parallel or a string of tp_plan

plan error: tp["a.weight"] = Partial(): a parameter cannot be stored as a sum that is pending
   = help: write Shard(dim) or Replicate()""",
    )


def test_bad_options_are_named():
    assert_expected_inline(
        refusals(
            lambda: Replicated(bucket_mb=-1),
            lambda: Replicated(bucket_mb=0),
            lambda: Replicated(bucket_mb="25"),  # type: ignore[arg-type]
            lambda: Replicated(reduce_dtype=torch.int32),
            lambda: Replicated(ignored_modules=3),  # type: ignore[arg-type]
            lambda: Replicated(3),  # type: ignore[arg-type]
            lambda: FullyShard(3),  # type: ignore[arg-type]
            lambda: FullyShard(reshard_after_forward="no"),  # type: ignore[arg-type]
            lambda: FullyShard(reshard_after_forward=-2),
            lambda: FullyShard(placement=Shard(0)),  # type: ignore[arg-type]
            lambda: Precision(param="bf16"),  # type: ignore[arg-type]
            lambda: Precision(reduce=torch.int8),
        ),
        """\
plan error: bucket_mb is -1
   = help: bucket_mb is a positive number of MiB

plan error: bucket_mb is 0
   = help: bucket_mb is a positive number of MiB

plan error: bucket_mb is '25'
   = help: bucket_mb is a positive number of MiB

plan error: reduce_dtype is torch.int32
   = help: reduce_dtype is a floating-point dtype, such as torch.bfloat16

plan error: ignored_modules of Replicated is 3
   = help: write a pattern, or several of them

plan error: modules of Replicated is 3
   = help: write a pattern, or several of them

plan error: a pattern of FullyShard is 3
   = help: write a pattern, or several of them

plan error: reshard_after_forward is 'no'
   = help: reshard_after_forward is True, False or a number of ranks

plan error: reshard_after_forward is -2
   = help: reshard_after_forward is True, False or a number of ranks

plan error: placement is Shard(dim=0)
   = help: placement is a function of the parameter that returns Shard(d)

plan error: param of Precision is 'bf16'
   = help: param of Precision is a floating-point dtype, such as torch.bfloat16

plan error: reduce of Precision is torch.int8
   = help: reduce of Precision is a floating-point dtype, such as torch.bfloat16""",
    )


def test_plan_errors_are_value_errors():
    assert issubclass(PlanError, ValueError)


def test_a_bare_entry_is_for_the_only_mesh_dim():
    style = ColwiseParallel()
    assert as_plan(style, ("tp",)).entries == {"tp": {"": style}}
    assert as_plan({"a": style}, ("x",)).entries == {"x": {"a": style}}
    assert as_plan("colwise", ("tp",)).entries == {"tp": {"": "colwise"}}
    assert as_plan(FullyShard("a"), ("dp",)).entries == {"dp": FullyShard("a")}
    assert as_plan(None, ("dp", "tp")).entries == {}


def test_a_plan_that_does_not_fit_the_mesh_shows_what_to_write():
    assert_expected_inline(
        refusals(
            lambda: as_plan({"a": ColwiseParallel()}, ("dp", "tp")),
            lambda: as_plan(ColwiseParallel(), ("dp", "tp")),
            lambda: as_plan(FullyShard("a"), ("dp", "tp")),
            lambda: as_plan({"dp": FullyShard()}, ("dp", "tp")),
            lambda: as_plan({"dp": FullyShard(), "tp": {}}, ("dp", "tp")),
            lambda: as_plan(Plan(tpp={}), ("dp", "tp")),
            lambda: as_plan([ColwiseParallel()], ("tp",)),
        ),
        """\
plan error: the plan does not say which mesh dim it is for, and the mesh has dp, tp
   = help: write Plan(tp={...})

plan error: the plan does not say which mesh dim it is for, and the mesh has dp, tp
   = help: write Plan(tp={"": ColwiseParallel()})

plan error: the plan does not say which mesh dim it is for, and the mesh has dp, tp
   = help: write Plan(tp=FullyShard("a"))

plan error: the plan is a dict of mesh dims
   = help: write Plan(**plan): a bare dict has patterns as keys

plan error: the plan is a dict of mesh dims
   = help: write Plan(**plan): a bare dict has patterns as keys

plan error: the plan names the mesh dim tpp, but the mesh has dp, tp
   = help: the nearest name is "tp"

plan error: the plan is a list
   = help: write a Plan, a dict of patterns, or a style for the root module""",
    )


def test_a_plan_knows_where_it_was_written():
    assert Plan().where.startswith("test_plan.py:")


LAYOUTS = {
    "dp=S(0) tp=S(-1)": Layout(dp=Shard(0), tp=Shard(-1)),
    "tp=R": Layout(tp=Replicate()),
    "dp=P(max) tp=_S(0, 3)": Layout(tp=_StridedShard(0, split_factor=3), dp=Partial("max")),
    "": Layout(),
}


@pytest.mark.parametrize("text", LAYOUTS)
def test_layouts_have_text(text: str):
    assert LAYOUTS[text].to_text() == text
    assert Layout.from_text(text) == LAYOUTS[text]
    assert hash(Layout.from_text(text)) == hash(LAYOUTS[text])


@pytest.mark.parametrize("text", ["tp", "tp=", "tp=X(0)", "tp=S(0) and", "S(0)", "tp=S"])
def test_other_text_is_no_layout(text: str):
    with pytest.raises(ValueError, match="no layout|no placement"):
        Layout.from_text(text)


def test_the_order_of_mesh_dims_in_a_layout_says_nothing():
    assert Layout(dp=Shard(0), tp=Shard(1)) == Layout(tp=Shard(1), dp=Shard(0))
    assert list(as_layout(Layout(tp=Shard(0), dp=Shard(0)), ("dp", "tp"), "x")) == ["dp", "tp"]


def test_what_is_no_layout_is_refused():
    assert_expected_inline(
        refusals(
            lambda: Layout(tp=0),  # type: ignore[arg-type]
            lambda: as_layout(Layout(ttp=Shard(0)), ("dp", "tp"), "inputs"),
            lambda: as_layout(Shard(0), ("dp", "tp"), "inputs"),
            lambda: as_layout("S(0)", ("tp",), "inputs[1]"),
        ),
        """\
plan error: Layout has tp=0
   = help: write a torch placement: Shard(dim), Replicate() or Partial()

plan error: inputs names the mesh dim ttp, but the mesh has dp, tp
   = help: the nearest name is "tp"

plan error: inputs is Shard(0), but the mesh has dp, tp
   = help: write Layout(tp=Shard(0))

plan error: inputs[1] is 'S(0)', which is no layout
   = help: a layout is a torch placement, or Layout(dp=Shard(0), ...) by mesh dim""",
    )


def test_a_bare_placement_means_the_only_mesh_dim():
    given: dict[str, Placement] = as_layout(Shard(1), ("x",), "inputs")
    assert given == {"x": Shard(1)}


def test_styles_are_checked_when_the_plan_is_written():
    with pytest.raises(PlanError, match="input_layouts holds 3"):
        Plan(tp={"a": PrepareModuleInput(input_layouts=(3,), desired_input_layouts=(Shard(0),))})  # type: ignore[arg-type]
