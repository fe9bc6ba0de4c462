"""Layouts of root inputs and outputs: what the user says of them, and the defaults."""

from collections import namedtuple

import pytest
import torch
from expecttest import assert_expected_inline
from torch.distributed.tensor import Partial, Placement, Replicate, Shard

from shardc import Layout, PlanError
from shardc.compiler.plan.roots import RootLayouts, parse_path

Pair = namedtuple("Pair", "left right")


def forward(x, batch=None, *rest, scale=1.0, **options):
    pass


def plain(x, y):
    pass


def roots(inputs=None, outputs=None, forward=plain, names=("dp", "tp"), data=("dp",)) -> RootLayouts:
    return RootLayouts(inputs, outputs, forward, names, data)


BATCH: dict[str, Placement] = {"dp": Shard(0)}
SPLIT = Layout(tp=Shard(1))


@pytest.mark.parametrize(
    "text, keys",
    [
        ("x", ["x"]),
        ("batch['ids']", ["batch", "ids"]),
        ("batch[0]['a'].left", ["batch", 0, "a", "left"]),
        ("args[1]", ["args", 1]),
        ("0", [0]),
        ("1[0]", [1, 0]),
        ("", []),
        ("[0]['a']", [0, "a"]),
        (".left", ["left"]),
        ("_", ["_"]),
        ("batch[<object>]", ["batch[<object>]"]),
    ],
)
def test_paths(text: str, keys: list):
    assert parse_path(text) == keys


def test_by_default_the_first_dim_is_the_batch():
    both = roots(data=("dp", "inner"))
    assert both.input_layout("x", 2) == {"dp": Shard(0), "inner": Shard(0)} == both.output_layout("output", 1)
    assert roots(data=()).input_layout("x", 2) == {}
    assert not both.says_input("x") and not both.says_output("output")


@pytest.mark.parametrize("inputs", [None, Layout(dp=Shard(0)), (Layout(dp=Shard(0)), None)])
def test_scalars_are_never_split(inputs):
    assert roots(inputs).input_layout("x", 0) == {} == roots(outputs=inputs).output_layout("output[0]", 0)


def test_one_layout_is_for_all():
    found = roots(SPLIT, SPLIT, forward)
    for name in ("x", "batch['ids']", "rest[0]", "more"):
        assert found.input_layout(name, 2) == {"tp": Shard(1)} and found.says_input(name)
    assert found.output_layout("output[1]", 2) == {"tp": Shard(1)}


def test_a_tuple_is_for_the_positional_arguments():
    found = roots((SPLIT, None))
    assert found.input_layout("x", 2) == {"tp": Shard(1)}
    assert found.input_layout("y", 2) == BATCH and not found.says_input("y")
    assert found.input_layout("0", 2) == {"tp": Shard(1)}


def test_a_tuple_may_go_on_into_the_further_arguments():
    found = roots((None, None, SPLIT), forward=forward)
    assert found.input_layout("rest[0]", 2) == {"tp": Shard(1)}
    assert found.input_layout("rest[1]", 2) == BATCH


def test_a_dict_is_for_arguments_by_name():
    found = roots({"batch": {"ids": SPLIT}, "scale": None, "extra": SPLIT}, forward=forward)
    assert found.input_layout("batch['ids']", 2) == {"tp": Shard(1)}
    assert found.input_layout("batch['mask']", 2) == BATCH == found.input_layout("x", 1)
    assert found.input_layout("extra", 2) == {"tp": Shard(1)}


def test_a_layout_is_a_prefix_of_what_it_is_for():
    found = roots(({"a": (SPLIT, None), "b": SPLIT}, Pair(SPLIT, None)))
    assert found.input_layout("x['a'][0]", 2) == {"tp": Shard(1)} == found.input_layout("x['b'][3]['c']", 2)
    assert found.input_layout("x['a'][1]", 2) == BATCH == found.input_layout("y.right", 2)
    assert found.input_layout("y.left", 2) == {"tp": Shard(1)}


def test_outputs_by_place():
    found = roots(outputs=(SPLIT, {"loss": Layout()}))
    assert found.output_layout("output[0]", 2) == {"tp": Shard(1)} == found.output_layout("[0]", 2)
    assert found.output_layout("output[1]['loss']", 1) == {} and found.says_output("output[1]['loss']")


def test_mesh_dims_not_named_replicate():
    assert roots((SPLIT, None)).input_layout("x", 2) == {"tp": Shard(1)}
    assert roots(Layout()).input_layout("x", 2) == {}
    assert roots(Layout(tp=Replicate())).input_layout("x", 2) == {}


def test_a_bare_placement_is_for_the_only_mesh_dim():
    found = roots(Shard(-1), names=("tp",), data=())
    assert found.input_layout("x", 3) == {"tp": Shard(2)}


def test_mesh_dims_on_one_dim_nest_in_mesh_order():
    assert list(roots(Layout(tp=Shard(0), dp=Shard(0))).input_layout("x", 1)) == ["dp", "tp"]


def test_a_pending_input_is_kept():
    assert roots(Layout(tp=Partial())).input_layout("x", 1) == {"tp": Partial()}


def test_without_a_signature_positions_are_enough():
    found = RootLayouts((None, SPLIT), None, dict, ("tp",), ())
    assert found.input_layout("args[1]", 2) == {"tp": Shard(1)}


def refusals(*asked) -> str:
    texts = []
    for ask in asked:
        with pytest.raises(PlanError) as caught:
            ask()
        texts.append(str(caught.value))
    return "\n".join(texts)


def test_mistakes_are_found_before_the_first_call():
    assert_expected_inline(
        refusals(
            lambda: roots((SPLIT, None, None)),
            lambda: roots({"z": SPLIT}),
            lambda: roots({"scael": SPLIT}, forward=lambda x, scale: None),
            lambda: roots(Shard(0)),
            lambda: roots((None, {"a": [3]})),
            lambda: roots(outputs=Layout(pp=Shard(0))),
            lambda: roots("S(0)"),
        ),
        """\
plan error: inputs has 3 layouts, but forward takes 2 positional arguments
   = help: give one layout for each, None for the default
plan error: inputs names z, but forward takes x, y
   = help: the nearest name is "x"
plan error: inputs names scael, but forward takes x, scale
   = help: the nearest name is "scale"
plan error: inputs is Shard(0), but the mesh has dp, tp
   = help: write Layout(tp=Shard(0))
plan error: inputs[1]['a'][0] is 3, which is no layout
   = help: a layout is a torch placement, or Layout(dp=Shard(0), ...) by mesh dim
plan error: outputs names the mesh dim pp, but the mesh has dp, tp
   = help: the nearest name is "dp"
plan error: inputs is 'S(0)', which is no layout
   = help: a layout is a torch placement, or Layout(dp=Shard(0), ...) by mesh dim""",
    )


def test_mistakes_that_only_a_value_shows():
    x, pair = torch.zeros(4), [torch.zeros(4)] * 2
    assert_expected_inline(
        refusals(
            lambda: roots(Layout(tp=Shard(1))).input_layout("x", 1),
            lambda: roots((SPLIT, None)).check_call((x,), {}),
            lambda: roots((SPLIT, None), forward=forward).check_call((x, x, x), {}),
            lambda: roots(((SPLIT, None), None)).check_call((x, x), {}),
            lambda: roots(((SPLIT, None, None), None)).check_call((pair, x), {}),
            lambda: roots(({"ids": SPLIT}, None)).check_call(({"idx": x}, x), {}),
            lambda: roots(((SPLIT, None), None)).input_layout("x", 1),
            lambda: roots(((SPLIT, None), None)).input_layout("x[2]", 1),
            lambda: roots(outputs=(SPLIT, None)).check_result(x),
            lambda: roots(outputs=(SPLIT, None)).output_layout("output", 1),
        ),
        """\
plan error: the input x is split on dim 1, but has 1 dims
   = help: name one of its dims
plan error: inputs has 2 layouts, but the call has 1 positional arguments
   = help: give one layout for each, None for the default
plan error: inputs has 2 layouts, but the call has 3 positional arguments
   = help: give one layout for each, None for the default
plan error: inputs[0] has 2 layouts, but is for one Tensor
   = help: give one layout for each, None for the default
plan error: inputs[0] has 3 layouts, but is for 2 values
   = help: give one layout for each, None for the default
plan error: inputs[0] names ids, which is not there
   = help: the nearest name is "idx"
plan error: inputs for x has 2 layouts, but is for one tensor
   = help: give one layout for each, None for the default
plan error: inputs for x[2] has 2 layouts, but is for something with a part 2
   = help: give one layout for each, None for the default
plan error: outputs has 2 layouts, but forward returns one value
   = help: give one layout for each, None for the default
plan error: outputs has 2 layouts, but is for one tensor
   = help: give one layout for each, None for the default""",
    )


def test_calls_that_fit():
    x = torch.zeros(4)
    roots((SPLIT, None)).check_call((x, x), {})
    roots((SPLIT, None)).check_call((x,), {"y": x})
    roots((SPLIT, None)).check_call((), {"y": x, "x": x})
    roots({"y": (SPLIT, SPLIT)}).check_call((x, (x, x)), {})
    roots(SPLIT).check_call((x, {"a": [x, x, x]}), {})
    roots(None).check_call((x,) * 5, {})
    roots(outputs=[SPLIT, {"a": None}]).check_result((x, {"a": x, "b": x}))
