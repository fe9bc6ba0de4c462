"""Layouts of root inputs and outputs: what the user says of them, and the defaults."""

from collections import namedtuple

import pytest
import torch
from expecttest import assert_expected_inline
from torch.distributed.tensor import Partial, Replicate, Shard

from shardc import Layout, PlanError
from shardc.compiler.plan.call_layouts import CallLayouts, parse_path

Pair = namedtuple("Pair", "left right")


def forward(x, batch=None, *rest, scale=1.0, **options):
    pass


def plain(x, y):
    pass


def calls(inputs=None, outputs=None, forward=plain, names=("dp", "tp")) -> CallLayouts:
    return CallLayouts(inputs, outputs, forward, names)


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


@pytest.mark.parametrize("inputs", [Layout(dp=Shard(0)), (Layout(dp=Shard(0)), None)])
def test_scalars_are_never_split(inputs):
    assert calls(inputs).given("in", "x", 0) == {} == calls(outputs=inputs).given("out", "output[0]", 0)


def test_one_layout_is_for_all():
    found = calls(SPLIT, SPLIT, forward)
    for name in ("x", "batch['ids']", "rest[0]", "more"):
        assert found.given("in", name, 2) == {"tp": Shard(1)}
    assert found.given("out", "output[1]", 2) == {"tp": Shard(1)}


def test_a_tuple_is_for_the_positional_arguments():
    found = calls((SPLIT, None))
    assert found.given("in", "x", 2) == {"tp": Shard(1)}
    assert found.given("in", "y", 2) is None
    assert found.given("in", "0", 2) == {"tp": Shard(1)}


def test_a_tuple_may_go_on_into_the_further_arguments():
    found = calls((None, None, SPLIT), forward=forward)
    assert found.given("in", "rest[0]", 2) == {"tp": Shard(1)}
    assert found.given("in", "rest[1]", 2) is None


def test_a_dict_is_for_arguments_by_name():
    found = calls({"batch": {"ids": SPLIT}, "scale": None, "extra": SPLIT}, forward=forward)
    assert found.given("in", "batch['ids']", 2) == {"tp": Shard(1)}
    assert found.given("in", "batch['mask']", 2) is None is found.given("in", "x", 1)
    assert found.given("in", "extra", 2) == {"tp": Shard(1)}


def test_a_layout_is_a_prefix_of_what_it_is_for():
    found = calls(({"a": (SPLIT, None), "b": SPLIT}, Pair(SPLIT, None)))
    assert found.given("in", "x['a'][0]", 2) == {"tp": Shard(1)} == found.given("in", "x['b'][3]['c']", 2)
    assert found.given("in", "x['a'][1]", 2) is None is found.given("in", "y.right", 2)
    assert found.given("in", "y.left", 2) == {"tp": Shard(1)}


def test_outputs_by_place():
    found = calls(outputs=(SPLIT, {"loss": Layout()}))
    assert found.given("out", "output[0]", 2) == {"tp": Shard(1)} == found.given("out", "[0]", 2)
    assert found.given("out", "output[1]['loss']", 1) == {}


def test_mesh_dims_not_named_replicate():
    assert calls((SPLIT, None)).given("in", "x", 2) == {"tp": Shard(1)}
    assert calls(Layout()).given("in", "x", 2) == {}
    assert calls(Layout(tp=Replicate())).given("in", "x", 2) == {}


def test_a_bare_placement_is_for_the_only_mesh_dim():
    found = calls(Shard(-1), names=("tp",))
    assert found.given("in", "x", 3) == {"tp": Shard(2)}


def test_mesh_dims_on_one_dim_nest_in_mesh_order():
    assert list(calls(Layout(tp=Shard(0), dp=Shard(0))).given("in", "x", 1) or ()) == ["dp", "tp"]


def test_a_pending_input_is_kept():
    assert calls(Layout(tp=Partial())).given("in", "x", 1) == {"tp": Partial()}


def test_without_a_signature_positions_are_enough():
    found = CallLayouts((None, SPLIT), None, dict, ("tp",))
    assert found.given("in", "args[1]", 2) == {"tp": Shard(1)}


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
            lambda: calls((SPLIT, None, None)),
            lambda: calls({"z": SPLIT}),
            lambda: calls({"scael": SPLIT}, forward=lambda x, scale: None),
            lambda: calls(Shard(0)),
            lambda: calls((None, {"a": [3]})),
            lambda: calls(outputs=Layout(pp=Shard(0))),
            lambda: calls("S(0)"),
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
plan error: inputs['y']['a'][0] is 3, which is no layout
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
            lambda: calls(Layout(tp=Shard(1))).given("in", "x", 1),
            lambda: calls((SPLIT, None)).check_call((x,), {}),
            lambda: calls((SPLIT, None), forward=forward).check_call((x, x, x), {}),
            lambda: calls(((SPLIT, None), None)).check_call((x, x), {}),
            lambda: calls(((SPLIT, None, None), None)).check_call((pair, x), {}),
            lambda: calls(({"ids": SPLIT}, None)).check_call(({"idx": x}, x), {}),
            lambda: calls(((SPLIT, None), None)).given("in", "x", 1),
            lambda: calls(outputs=(SPLIT, None)).check_result(x),
            lambda: calls(outputs=(SPLIT, None)).given("out", "output", 1),
        ),
        """\
plan error: the input x is split on dim 1, but has 1 dims
   = help: name one of its dims
plan error: inputs has 2 layouts, but the call has 1 positional arguments
   = help: give one layout for each, None for the default
plan error: inputs has 2 layouts, but the call has 3 positional arguments
   = help: give one layout for each, None for the default
plan error: inputs[0] has 2 layouts, but there is one value
   = help: give one layout for each, None for the default
plan error: inputs[0] has 3 layouts, but is for 2 values
   = help: give one layout for each, None for the default
plan error: inputs[0] names ids, which is not there
   = help: the nearest name is "idx"
plan error: the input x is one tensor, but its parts have layouts
   = help: give it one layout
plan error: outputs has 2 layouts, but there is one value
   = help: give one layout for each, None for the default
plan error: the output is one tensor, but its parts have layouts
   = help: give it one layout""",
    )


def test_calls_that_fit():
    x = torch.zeros(4)
    calls((SPLIT, None)).check_call((x, x), {})
    calls((SPLIT, None)).check_call((x,), {"y": x})
    calls((SPLIT, None)).check_call((), {"y": x, "x": x})
    calls({"y": (SPLIT, SPLIT)}).check_call((x, (x, x)), {})
    calls(SPLIT).check_call((x, {"a": [x, x, x]}), {})
    calls(None).check_call((x,) * 5, {})
    calls(outputs=[SPLIT, {"a": None}]).check_result((x, {"a": x, "b": x}))
