"""What users get wrong, and the whole of what they are told: what, where, which name, what to do.

Nothing here needs ranks: each of these is said before anything is sent. Line numbers are left out of the texts.
"""

# ruff: noqa: E501  (what is printed is not wrapped)

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor, nn
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel

import shardc
from shardc import FullyShard, Layout, Mesh, Plan, Precision, Replicated
from tests.acceptance.models import MLP, MLP_TP, Nested, Transformer

TWO = Mesh(tp=2)


def x() -> Tensor:
    return torch.randn(8, 16)


def said(call: Callable[[], Any]) -> str:
    """The error that a call ends with, as it is printed, without line numbers."""
    try:
        call()
    except Exception as error:
        text = "".join(traceback.format_exception_only(error)).rstrip()
        return re.sub(r"(\w+\.py):\d+", r"\1:N", text).replace("shardc.compiler.errors.", "")
    return "nothing was said"


def mlp(plan: Any = MLP_TP, **options: Any) -> shardc.CompiledModule:
    return shardc.compile(MLP(), plan, **{"mesh": TWO, **options})


class Does(nn.Module):
    """A Linear and what is done with what it gives."""

    def __init__(self, do: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.lin, self.do = nn.Linear(16, 16), do

    def forward(self, x: Tensor) -> Any:
        return self.do(self.lin(x))


def branch(y: Tensor) -> Tensor:
    if y.sum() > 0:
        return y
    return -y


def pick(y: Tensor) -> Tensor:
    some = y[y.sum(1) > 0]
    return some if len(some) > 2 else y


def refuse(y: Tensor) -> Tensor:
    if y.shape[0] < 100:
        raise ValueError("only on Tuesdays")
    return y


def does(do: Callable[[Tensor], Any], **options: Any) -> Callable[[], Any]:
    """The call of such a module, compiled."""
    plan = options.pop("plan", {"lin": ColwiseParallel()})
    return lambda: shardc.compile(Does(do), plan, **{"mesh": TWO, **options})(x())


# --- the model


def test_a_class_for_a_model():
    assert_expected_inline(
        said(lambda: shardc.compile(MLP, MLP_TP, mesh=TWO)),
        """\
PlanError: plan error: compile was given the class MLP
  --> test_mistakes.py:N
   = help: build it first: MLP(...)""",
    )  # pyright: ignore


def test_arguments_in_the_wrong_order():
    assert_expected_inline(
        said(lambda: shardc.compile(MLP_TP, MLP(), mesh=TWO)),
        """\
PlanError: plan error: compile takes an nn.Module, not a dict
  --> test_mistakes.py:N
   = help: write compile(model, plan, mesh=mesh)""",
    )  # pyright: ignore


def test_compiled_already():
    model = MLP()
    compiled = shardc.compile(model, MLP_TP, mesh=TWO)
    assert_expected_inline(
        said(lambda: shardc.compile(model, MLP_TP, mesh=TWO)),
        """\
PlanError: plan error: this module is compiled already
  --> test_mistakes.py:N
   = help: compile the outermost module once, with one plan, and call what compile returned""",
    )
    assert said(lambda: shardc.compile(compiled, MLP_TP, mesh=TWO)) == said(
        lambda: shardc.compile(model, MLP_TP, mesh=TWO)
    )


def test_a_part_compiled_already():
    model = Nested()
    shardc.compile(model.encoder, MLP_TP, mesh=TWO)
    assert_expected_inline(
        said(lambda: shardc.compile(model, {"stem": ColwiseParallel()}, mesh=TWO)),
        """\
PlanError: plan error: encoder is compiled already
  --> test_mistakes.py:N
   = help: compile the outermost module once, with one plan, and call what compile returned""",
    )


def test_a_model_on_meta():
    assert_expected_inline(
        said(
            lambda: shardc.compile(nn.MultiheadAttention(8, 2, device="meta"), {"out_proj.weight": Shard(0)}, mesh=TWO)
        ),
        """\
PlanError: plan error: on meta, in modules without reset_parameters: in_proj_weight, in_proj_bias
  --> test_mistakes.py:N
   = help: give compile an init: a function of each such module, a state_dict or a path, or a pair of them (path, function) where a file lacks some; or use deferred_init""",
    )


def test_an_init_that_is_not_callable():
    assert_expected_inline(
        said(lambda: mlp(init=3)),
        """\
PlanError: plan error: init is 3, which ought to be callable, a state_dict or a path, or a pair of these
  --> test_mistakes.py:N
   = help: a function is called with every module that owns tensors on meta; None calls its reset_parameters; of a pair (state_dict or path, function) the function fills what the first lacks""",
    )


def test_a_lazy_model():
    model = nn.Sequential(nn.LazyLinear(3))
    assert_expected_inline(
        said(lambda: shardc.compile(model, {"0": ColwiseParallel()}, mesh=TWO)),
        """\
PlanError: plan error: 0.weight has no shape yet
  --> test_mistakes.py:N
   = help: run the lazy module on one batch before compiling it""",
    )


# --- the mesh


def test_an_unknown_mesh_dim():
    assert_expected_inline(
        said(lambda: mlp(Plan(tpp=MLP_TP))),
        """\
PlanError: plan error: the plan names the mesh dim tpp, but the mesh has tp
  --> test_mistakes.py:N
   = help: the nearest name is "tp\"""",
    )


def test_a_mesh_that_is_none():
    assert_expected_inline(
        said(lambda: mlp(mesh=(2, 2))),
        """\
PlanError: plan error: mesh is (2, 2), which is no mesh
  --> test_mistakes.py:N
   = help: pass a torch DeviceMesh (init_device_mesh) or shardc.Mesh(dp=2, tp=2)""",
    )


def test_several_mesh_dims_and_no_mesh():
    assert_expected_inline(
        said(lambda: mlp(Plan(dp=Replicated(), tp=MLP_TP), mesh=None)),
        """\
PlanError: plan error: the plan has mesh dims dp, tp and there is no mesh to say their sizes
  --> test_mistakes.py:N
   = help: mesh=init_device_mesh("cpu", (?, ?), mesh_dim_names=("dp", "tp"))""",
    )


def test_a_plan_for_one_of_several_mesh_dims():
    assert_expected_inline(
        said(lambda: mlp(mesh=Mesh(dp=2, tp=2))),
        """\
PlanError: plan error: the plan does not say which mesh dim it is for, and the mesh has dp, tp
  --> test_mistakes.py:N
   = help: write Plan(tp={...})""",
    )


def test_a_mesh_dim_without_ranks():
    assert_expected_inline(
        said(lambda: Mesh(tp=0)),
        """\
PlanError: plan error: mesh dim tp has size 0
   = help: a mesh dim's size is a positive integer""",
    )


# --- the plan


def test_an_object_that_is_no_style():
    assert_expected_inline(
        said(lambda: mlp({"net1": nn.ReLU()})),
        """\
PlanError: plan error: tp["net1"] is ReLU(), which is no style
  --> test_mistakes.py:N
   = help: write a style of torch.distributed.tensor.parallel or a string of tp_plan""",
    )


def test_a_style_not_built():
    assert_expected_inline(
        said(lambda: mlp({"net1": ColwiseParallel})),
        """\
PlanError: plan error: tp["net1"] is the class ColwiseParallel
  --> test_mistakes.py:N
   = help: write ColwiseParallel()""",
    )


def test_an_unknown_string_of_tp_plan():
    assert_expected_inline(
        said(lambda: mlp({"net1": "colwize"})),
        """\
PlanError: plan error: tp["net1"] = "colwize" is not a string of tp_plan
  --> test_mistakes.py:N
   = help: the nearest is "colwise\"""",
    )


def test_a_plan_that_is_none():
    assert_expected_inline(
        said(lambda: mlp(3)),
        """\
PlanError: plan error: the plan is 3
  --> test_mistakes.py:N
   = help: write a Plan, a dict of patterns, or a style for the root module""",
    )


def test_a_dict_of_mesh_dims():
    assert_expected_inline(
        said(lambda: mlp({"tp": MLP_TP})),
        """\
PlanError: plan error: the plan is a dict of mesh dims
  --> test_mistakes.py:N
   = help: write Plan(**plan): a bare dict has patterns as keys""",
    )


def test_a_key_that_matches_nothing():
    plan = {"nett1": ColwiseParallel(), "net2": RowwiseParallel()}
    with pytest.warns(UserWarning) as caught:
        mlp(plan)(x())
    assert_expected_inline(
        "\n".join(str(w.message) for w in caught), """tp["nett1"] matches nothing; the nearest name is "net1\""""
    )
    assert caught[0].filename == __file__
    assert_expected_inline(
        said(lambda: mlp(plan, strict=True)),
        """\
PlanError: plan error: tp["nett1"] matches nothing
  --> test_mistakes.py:N
   = help: the nearest name is "net1\"""",
    )


def test_two_keys_that_disagree():
    assert_expected_inline(
        said(lambda: mlp({"net*": ColwiseParallel(), "*2": RowwiseParallel()})),
        """\
PlanError: plan error: two keys match net2
  --> test_mistakes.py:N
   | tp["net*"] = ColwiseParallel()
   | tp["*2"] = RowwiseParallel()
   = help: a key that writes the name out wins over patterns: add "net2\"""",
    )


def test_two_plans_for_tied_weights():
    plan = {"tokens": ColwiseParallel(), "head": ColwiseParallel()}
    assert_expected_inline(
        said(lambda: shardc.compile(Transformer(tied=True), plan, mesh=TWO)),
        """\
PlanError: plan error: tokens.weight and head.weight are one tied parameter, laid out in two ways
  --> test_mistakes.py:N
   | tokens.weight is Shard(1): tp["tokens"] = ColwiseParallel()
   | head.weight is Shard(0): tp["head"] = ColwiseParallel()
   = help: decide by its name: "tokens.weight": Shard(1)""",
    )


def test_a_placement_on_a_dim_that_is_not_there():
    assert_expected_inline(
        said(lambda: mlp({"net1.weight": Shard(2)})),
        """\
PlanError: plan error: net1.weight is split on dim 2, but has 2 dims
  --> test_mistakes.py:N
   | tp["net1.weight"] = Shard(2)
   = help: name one of its dims""",
    )


def test_a_parameter_stored_as_a_pending_sum():
    assert_expected_inline(
        said(lambda: mlp({"net1.weight": Partial()})),
        """\
PlanError: plan error: tp["net1.weight"] = Partial(): a parameter cannot be stored as a sum that is pending
  --> test_mistakes.py:N
   = help: write Shard(dim) or Replicate()""",
    )


def test_a_style_for_a_parameter():
    assert_expected_inline(
        said(lambda: mlp({"net1.weight": ColwiseParallel()})),
        """\
PlanError: plan error: tp["net1.weight"] = ColwiseParallel() names net1.weight, a parameter or buffer
  --> test_mistakes.py:N
   = help: a style is for a module: write "net1", or give the parameter a placement""",
    )


def test_a_placement_for_a_module():
    assert_expected_inline(
        said(lambda: mlp({"net1": Shard(0)})),
        """\
PlanError: plan error: tp["net1"] = Shard(0) names net1, a module
  --> test_mistakes.py:N
   = help: a placement is for a parameter: net1.weight, net1.bias""",
    )


def test_columns_of_a_container():
    plan = {"encoder": ColwiseParallel()}
    assert_expected_inline(
        said(lambda: shardc.compile(Nested(), plan, mesh=TWO)),
        """\
PlanError: plan error: tp["encoder"] = ColwiseParallel() names encoder, a MLP with no parameters of its own
  --> test_mistakes.py:N
   = help: name modules inside it: encoder.net1, encoder.net2""",
    )


def test_columns_of_what_has_no_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert_expected_inline(
        said(lambda: shardc.compile(model, {"1": ColwiseParallel()}, mesh=TWO)),
        """\
PlanError: plan error: tp["1"] = ColwiseParallel() names 1, a ReLU, which has no parameters to split
  --> test_mistakes.py:N
   = help: leave it out, or lay out what passes through it with PrepareModuleInputOutput""",
    )


def test_columns_of_a_norm():
    plan = {"norm": ColwiseParallel()}
    assert_expected_inline(
        said(lambda: shardc.compile(Transformer(), plan, mesh=TWO)),
        """\
PlanError: plan error: tp["norm"] = ColwiseParallel() names norm, a LayerNorm, whose columns and rows are not known
  --> test_mistakes.py:N
   = help: give its parameters placements, such as Shard(0): norm.weight, norm.bias""",
    )


# --- layouts


def test_more_layouts_than_arguments():
    layouts = {"input_layouts": (Shard(0), None), "desired_input_layouts": (Replicate(), None)}
    assert_expected_inline(
        said(lambda: mlp({"net1": PrepareModuleInput(**layouts)})),
        """\
PlanError: plan error: tp["net1"]: input_layouts has 2 layouts, but forward of net1 takes 1 positional arguments
  --> test_mistakes.py:N
   = help: give one layout for each, None for what is left alone""",
    )


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 16)

    def forward(self, *xs: Tensor) -> Tensor:
        return self.lin(torch.stack(xs).sum(0))


class SumsTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sums = Sums()

    def forward(self, x: Tensor) -> Tensor:
        return self.sums(x, 2 * x)


def test_fewer_layouts_than_a_module_is_called_with():
    style = PrepareModuleInput(input_layouts=(Shard(0),), desired_input_layouts=(Replicate(),))
    assert_expected_inline(
        said(lambda: shardc.compile(SumsTwo(), {"sums": style}, mesh=TWO)(x())),
        """\
PlanError: plan error: sums has 2 positional arguments, but its layouts are for 1
  --> test_mistakes.py:N
   = help: give one layout for each, None for what is left alone""",
    )


def test_another_number_of_layouts_than_arguments_at_the_call():
    plan, layouts = {"lin": ColwiseParallel()}, (Shard(0), None)
    compiled = shardc.compile(Sums(), plan, mesh=TWO, inputs=layouts)
    compiled(x(), x())
    assert_expected_inline(
        said(lambda: compiled(x())),
        """\
PlanError: plan error: inputs has 2 layouts, but the call has 1 positional arguments
  --> test_mistakes.py:N
   = help: give one layout for each, None for the default""",
    )


def test_several_layouts_for_one_result():
    assert_expected_inline(
        said(lambda: mlp(outputs=(Shard(0), None))(x())),
        """\
PlanError: plan error: outputs has 2 layouts, but there is one value
  --> test_mistakes.py:N
   = help: give one layout for each, None for the default""",
    )


def test_a_layout_on_a_dim_that_the_input_lacks():
    assert_expected_inline(
        said(lambda: mlp(inputs=Shard(2))(x())),
        """\
PlanError: plan error: the input x is split on dim 2, but has 2 dims
  --> test_mistakes.py:N
   = help: name one of its dims""",
    )
    assert_expected_inline(
        said(lambda: mlp({"net1": ColwiseParallel(input_layouts=Shard(3))})(x())),
        """\
PlanError: plan error: input x has shape (8, 16): Shard(3) does not fit a tensor of 2 dims
  --> test_mistakes.py:N
   = help: name a dim that the tensor has""",
    )


def test_a_style_on_a_dim_that_a_value_lacks():
    model = nn.Sequential(nn.LayerNorm(16))
    plan = {"0": SequenceParallel(sequence_dim=4)}
    assert_expected_inline(
        said(lambda: shardc.compile(model, plan, mesh=TWO)(x())),
        """\
PlanError: plan error: what enters 0 has shape (8, 16): Shard(4) does not fit a tensor of 2 dims
  --> normalization.py:N in forward
   | tp["0"] = SequenceParallel(sequence_dim=4)
   = help: name a dim that the tensor has""",
    )


def test_a_layout_that_is_none():
    assert_expected_inline(
        said(lambda: mlp(inputs="batch")),
        """\
PlanError: plan error: inputs is 'batch', which is no layout
  --> test_mistakes.py:N
   = help: a layout is a torch placement, or Layout(dp=Shard(0), ...) by mesh dim""",
    )


def test_a_layout_for_an_unknown_argument():
    assert_expected_inline(
        said(lambda: mlp(inputs={"X": Shard(0)})),
        """\
PlanError: plan error: inputs names X, but forward takes x
  --> test_mistakes.py:N
   = help: the nearest name is "x\"""",
    )


def test_a_constraint_on_a_dim_that_the_value_lacks():
    assert_expected_inline(
        said(does(lambda y: shardc.constrain(y, Shard(5)))),
        """\
PlanError: plan error: the value given to constrain has shape (8, 16): Shard(5) does not fit a tensor of 2 dims
  --> test_mistakes.py:N in <lambda>
   = help: name a dim that the tensor has""",
    )


def test_a_constraint_over_an_unknown_mesh_dim():
    assert_expected_inline(
        said(does(lambda y: shardc.constrain(y, Layout(pp=Shard(0))))),
        """\
PlanError: plan error: the layout given to constrain names the mesh dim pp, but the mesh has tp
  --> test_mistakes.py:N in <lambda>
   = help: the nearest name is "tp\"""",
    )


def test_a_constraint_that_does_not_say_over_which_mesh_dim():
    plan = Plan(dp=Replicated(), tp={"lin": ColwiseParallel()})
    call = does(lambda y: shardc.constrain(y, Shard(0)), plan=plan, mesh=Mesh(dp=2, tp=2))
    assert_expected_inline(
        said(call),
        """\
PlanError: plan error: the layout given to constrain is Shard(0), but the mesh has dp, tp
  --> test_mistakes.py:N in <lambda>
   = help: write Layout(tp=Shard(0))""",
    )


# --- options


def test_an_unknown_option():
    assert_expected_inline(
        said(lambda: mlp(backnd="eager")), """TypeError: compile() got an unexpected keyword argument 'backnd'"""
    )


def test_values_that_options_do_not_take():
    assert_expected_inline(
        said(lambda: mlp(rng="numpy")),
        """\
PlanError: plan error: rng is 'numpy'
  --> test_mistakes.py:N
   = help: rng is "counter" or "replay\"""",
    )
    assert_expected_inline(
        said(lambda: mlp(src_data_rank=2)),
        """\
PlanError: plan error: src_data_rank is 2
  --> test_mistakes.py:N
   = help: src_data_rank is a rank of the mesh, below 2, or None""",
    )
    assert_expected_inline(
        said(lambda: mlp(recompute=True)),
        """\
PlanError: plan error: recompute is True
  --> test_mistakes.py:N
   = help: recompute is a pattern of module names, or several""",
    )
    assert_expected_inline(
        said(lambda: Replicated(bucket_mb=-25)),
        """\
PlanError: plan error: bucket_mb is -25
   = help: bucket_mb is a positive number of MiB""",
    )
    assert_expected_inline(
        said(lambda: FullyShard(reshard_after_forward="no")),
        """\
PlanError: plan error: reshard_after_forward is 'no'
   = help: reshard_after_forward is True, False or a number of ranks""",
    )  # pyright: ignore
    assert_expected_inline(
        said(lambda: Precision(param=torch.int8)),
        """\
PlanError: plan error: param of Precision is torch.int8
   = help: param of Precision is a floating-point dtype, such as torch.bfloat16""",
    )


def test_recomputing_what_is_not_there():
    with pytest.warns(UserWarning) as caught:
        mlp(recompute="net3")
    assert_expected_inline(str(caught[0].message), """recompute "net3" matches nothing; the nearest name is "net1\"""")
    assert_expected_inline(
        said(lambda: mlp(recompute="net3", strict=True)),
        """\
PlanError: plan error: recompute "net3" matches nothing
  --> test_mistakes.py:N
   = help: the nearest name is "net1\"""",
    )


# --- the call


def test_another_call_than_forwards():
    assert_expected_inline(
        said(lambda: mlp()(x(), x())),
        """\
PlanError: plan error: forward of MLP cannot be called so: too many positional arguments
  --> test_mistakes.py:N
   = help: it is forward(x: 'Tensor') -> 'Tensor'""",
    )
    assert_expected_inline(
        said(lambda: mlp()(y=x())),
        """\
PlanError: plan error: forward of MLP cannot be called so: missing a required argument: 'x'
  --> test_mistakes.py:N
   = help: it is forward(x: 'Tensor') -> 'Tensor'""",
    )


def test_a_shape_that_forward_does_not_take():
    compiled = mlp()
    compiled(x())
    assert_expected_inline(
        said(lambda: compiled(torch.randn(8, 15))),
        """\
ShardingError: sharding error: forward raises RuntimeError: a and b must have same reduction dim, but got [8, 15] X [16, 23].
  --> models.py:N in forward
   |       def forward(self, x: Tensor) -> Tensor:
   | >         return self.net2(F.relu(self.net1(x)))
   = help: if it runs without compiling, move what torch cannot trace out of forward, or out of the module""",
    )


def test_a_dtype_that_forward_does_not_take():
    assert_expected_inline(
        said(lambda: mlp()(x().double())),
        """\
RuntimeError: expected m1 and m2 to have the same dtype, but got: double != float
  --> models.py:N in forward
   | > %mm_default = aten.mm""",
    )


class Thing:
    __slots__ = ()
    __hash__ = None  # pyright: ignore


def test_an_argument_that_nothing_can_be_compared_with():
    class Takes(nn.Linear):
        def forward(self, x: Tensor, thing: Any) -> Tensor:
            return super().forward(x)

    compiled = shardc.compile(Takes(16, 16), ColwiseParallel(), mesh=TWO)
    assert_expected_inline(
        said(lambda: compiled(x(), Thing())),
        """\
PlanError: plan error: an input of type Thing is neither a tensor nor a value that can be compared
  --> test_mistakes.py:N
   = help: pass tensors, numbers, strings, None, or lists, tuples and dicts of them""",
    )
    assert_expected_inline(
        said(lambda: compiled(x(), x().numpy())),
        """\
PlanError: plan error: an input of type ndarray is neither a tensor nor a value that can be compared
  --> test_mistakes.py:N
   = help: pass tensors, numbers, strings, None, or lists, tuples and dicts of them""",
    )


def test_a_sparse_tensor():
    assert_expected_inline(
        said(lambda: mlp()(x().to_sparse())),
        """\
ShardingError: sharding error: x is a sparse_coo tensor
  --> test_mistakes.py:N in <lambda>
   |       assert_expected_inline(
   | >         said(lambda: mlp()(x().to_sparse())),
   |           \"\"\"\\
   = help: use a dense one, or index_select and index_add by the places of its entries""",
    )


# --- what forward does


def test_a_branch_on_a_value():
    assert_expected_inline(
        said(does(branch)),
        """\
ShardingError: sharding error: forward depends on the value of a tensor, which is not known when tracing
  --> test_mistakes.py:N in branch
   |   def branch(y: Tensor) -> Tensor:
   | >     if y.sum() > 0:
   |           return y
   = help: compute both sides and choose with torch.where, or move the branch out of forward; a size must be a Python number, not read from a tensor""",
    )


def test_a_branch_on_a_size_that_depends_on_values():
    assert_expected_inline(
        said(does(pick)),
        """\
ShardingError: sharding error: forward depends on the value of a tensor, which is not known when tracing
  --> test_mistakes.py:N in pick
   |       some = y[y.sum(1) > 0]
   | >     return some if len(some) > 2 else y
   = help: compute both sides and choose with torch.where, or move the branch out of forward; a size must be a Python number, not read from a tensor""",
    )


def test_plain_values_among_the_results_are_given_back():
    returned = does(lambda y: (y, 3, None, "four", {"five": [5.5, True]}))()
    assert isinstance(returned[0], Tensor)
    assert returned[1:] == (3, None, "four", {"five": [5.5, True]})
    assert type(returned[4]["five"][1]) is bool


def test_a_result_of_no_known_kind():
    assert_expected_inline(
        said(does(lambda y: (y, Thing()))),
        """\
ShardingError: sharding error: output[1] is a Thing, which is neither a tensor nor a plain value
  --> test_mistakes.py:N
   = help: return tensors in lists, tuples, dicts, or a dataclass given to torch.export.register_dataclass""",
    )


def test_an_error_of_forwards_own():
    assert_expected_inline(
        said(does(refuse)),
        """\
ShardingError: sharding error: forward raises ValueError: only on Tuesdays
  --> test_mistakes.py:N in refuse
   |       if y.shape[0] < 100:
   | >         raise ValueError("only on Tuesdays")
   |       return y
   = help: if it runs without compiling, move what torch cannot trace out of forward, or out of the module""",
    )


@torch.library.custom_op("mistakes::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_an_operator_without_a_rule_under_strict():
    with torch.no_grad():
        assert_expected_inline(
            said(does(twice, strict=True)),
            """\
ShardingError: sharding error: mistakes.twice has no sharding rule, and strict=True allows none without
  --> test_mistakes.py:N in forward
   |   %mark_1: f32[8, 16@tp] = shardc.mark(%add_tensor, lin|out|)
   | > %twice: f32[8, 16] = mistakes.twice(%mark_1)
   = help: say what its dims mean: shardc.rule(torch.ops.mistakes.twice.default, "... -> ...")""",
        )
        program = shardc.compile(Does(twice), {"lin": ColwiseParallel()}, mesh=TWO).lower(x())
    assert program.notes() == ["mistakes.twice has no rule: 1 calls run on whole operands"]


def test_gradients_differentiated_again():
    def penalty() -> None:
        given = x().requires_grad_()
        (slope,) = torch.autograd.grad(mlp()(given).sum(), given, create_graph=True)
        slope.norm().backward()

    assert_expected_inline(
        said(penalty),
        """\
ShardingError: sharding error: a gradient of the compiled module is differentiated once more, and its program has no second backward
   = help: leave create_graph=True out, or keep what needs second derivatives outside of the compiled module""",
    )


# --- afterwards


def test_a_parameter_added_after_compile():
    compiled = mlp()
    compiled(x())
    compiled.net1.register_parameter("lora", nn.Parameter(torch.zeros(2)))
    assert_expected_inline(
        said(lambda: compiled(x())),
        """\
ShardingError: sharding error: the module changed after compile: net1.lora
  --> test_mistakes.py:N
   = help: add parameters (adapters, LoRA) before compile, so that they are laid out and reduced""",
    )


def test_a_module_replaced_after_compile():
    compiled = mlp()
    compiled.net1 = nn.Linear(16, 23)
    assert_expected_inline(
        said(lambda: compiled(x())),
        """\
ShardingError: sharding error: the module changed after compile: net1
  --> test_mistakes.py:N
   = help: add parameters (adapters, LoRA) before compile, so that they are laid out and reduced""",
    )


def test_questions_a_program_cannot_answer():
    program = mlp().lower(x())
    assert_expected_inline(
        said(lambda: program.stage("FINAL")),
        """ValueError: no stage 'FINAL'; stages are TRACED, SHARDED, RESHARDED, LOCAL, SCHEDULED""",
    )
    assert_expected_inline(
        said(lambda: program.explain("%mmm")),
        """\
ShardingError: sharding error: no value %mmm in the program
   = help: nearest name: %mm""",
    )
    assert_expected_inline(
        said(lambda: program.verify(torch.randn(4, 16))),
        """\
ShardingError: sharding error: x has global shape (4, 16), and the program is for (8, 16)
   = help: verify takes global inputs, of the shapes that the program was compiled for""",
    )
