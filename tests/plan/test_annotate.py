"""replicate() and fully_shard(): what they accept, and that they leave no trace on the module."""

import copy
import gc

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.distributed.tensor import Shard

import shardc
from shardc import FullyShard, Mesh, PlanError, Replicated
from shardc.compiler.plan.annotate import annotated
from shardc.compiler.plan.resolve import resolve
from shardc.compiler.plan.resolved import Resolved


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def local(found: Resolved) -> set[str]:
    """The parameters whose gradients are not reduced."""
    return {fqn for fqn, layout in found.params.items() if layout.local}


def test_both_return_the_module_and_leave_no_trace_on_it():
    model = mlp()
    keys, attributes = list(model.state_dict()), set(vars(model))
    assert shardc.replicate(model) is model
    assert shardc.fully_shard(model[0]) is model[0]
    assert list(model.state_dict()) == keys and set(vars(model)) == attributes
    assert [(fqn, type(note.entry)) for fqn, note in annotated(model)] == [
        ("", Replicated),
        ("0", FullyShard),
    ]


def test_a_copy_is_not_annotated():
    assert annotated(copy.deepcopy(shardc.replicate(mlp()))) == []


def test_an_annotation_dies_with_its_module():
    from shardc.compiler.plan import annotate

    before = len(annotate._annotations)
    model = shardc.replicate(mlp())
    assert len(annotate._annotations) == before + 1
    del model
    gc.collect()
    assert len(annotate._annotations) == before


@pytest.mark.parametrize("device_id", [[0], "cpu", True, 1.0])
def test_a_device_is_an_int_or_a_device(device_id):
    with pytest.raises(RuntimeError, match="Expected device_id to be int or torch.device"):
        shardc.replicate(mlp(), device_id=device_id)


@pytest.mark.parametrize("device_id", [0, torch.device("cpu")])
def test_the_device_is_kept(device_id):
    model = shardc.replicate(mlp(), device_id=device_id)
    assert resolve(None, model, Mesh(dp=2)).device_id == device_id


@pytest.mark.parametrize(
    "options", [{"find_unused_parameters": True}, {"gradient_as_bucket_view": True}, {"static_graph": True}]
)
def test_options_of_ddp_are_accepted(options):
    shardc.replicate(mlp(), **options)


def refusals(*makers) -> str:
    texts = []
    for make in makers:
        with pytest.raises(PlanError) as caught:
            make()
        texts.append(str(caught.value))
    return "\n\n".join(texts)


def test_bad_options_are_named():
    assert_expected_inline(
        refusals(
            lambda: shardc.replicate(mlp(), bucket_cap_mb=-1),
            lambda: shardc.replicate(mlp(), static_graf=True),
            lambda: shardc.replicate(mlp(), static_graph=3),
            lambda: shardc.replicate(mlp(), mixed_precision=None),
            lambda: shardc.replicate(mlp(), mesh_dim=0),  # type: ignore[arg-type]
            lambda: shardc.replicate([mlp()]),  # type: ignore[arg-type]
            lambda: shardc.replicate(mlp(), ignored_modules=[3]),  # type: ignore[list-item]
            lambda: shardc.fully_shard(mlp(), reshard_after_forward=-1),
        ),
        """\
plan error: bucket_cap_mb is -1
   = help: bucket_cap_mb is a positive number of MiB

plan error: replicate has no option static_graf
   = help: the nearest name is "static_graph"

plan error: static_graph is 3
   = help: static_graph is True or False

plan error: replicate has no option mixed_precision
   = help: use the option precision of compile

plan error: mesh_dim is 0
   = help: mesh_dim is the name of a mesh dim

plan error: module is a list
   = help: annotate one nn.Module at a time

plan error: ignored_modules of Replicated is 3
   = help: write a pattern, or several of them

plan error: reshard_after_forward is -1
   = help: reshard_after_forward is True, False or a number of ranks""",
    )


def test_twice_for_one_mesh_dim_is_refused():
    model = shardc.replicate(mlp())
    with pytest.raises(PlanError, match="Sequential is annotated twice for the mesh dim dp") as caught:
        shardc.fully_shard(model)
    assert "the first is at test_annotate.py:" in caught.value.help
    assert caught.value.where.startswith("test_annotate.py:")


def test_twice_for_two_mesh_dims_is_hybrid_sharding():
    model = shardc.fully_shard(shardc.replicate(mlp(), mesh_dim="outer"), mesh_dim="inner")
    found = resolve(None, model, Mesh(outer=2, inner=2))
    assert found.data_axes == ("outer", "inner")
    assert found.params["0.weight"].stored.text() == "[8@inner, 4]"


def test_a_sharded_module_inside_a_replicated_one_keeps_its_layout():
    model = shardc.replicate(mlp(), bucket_cap_mb=1)
    shardc.fully_shard(model[0], placement=lambda p: Shard(p.ndim - 1), reshard_after_forward=False)
    found = resolve(None, model, Mesh(dp=2))
    assert found.params["0.weight"].stored.text() == "[8, 4@dp]"
    assert found.params["0.weight"].unit == {"dp": "0"}
    assert found.params["2.weight"].stored.is_whole
    assert found.params["2.weight"].keys == {"dp": 'replicate("")'}
    assert not local(found)
    assert found.bucket_bytes == {"dp": 1024 * 1024}
    assert found.params["0.weight"].kept.is_whole


def test_units_may_reshard_each_in_its_way():
    model = shardc.fully_shard(mlp())
    shardc.fully_shard(model[2], reshard_after_forward=False)
    found = resolve(None, model, Mesh(dp=2))
    assert [found.params[name].kept.is_whole for name in ("0.weight", "2.weight")] == [False, True]


def test_children_alone():
    model = mlp()
    shardc.replicate(model[0])
    shardc.replicate(model[2])
    found = resolve(None, model, Mesh(dp=2))
    assert not local(found)
    assert found.params["2.bias"].keys == {"dp": 'replicate("2")'}


def test_gradients_that_no_annotation_covers_are_warned_of():
    model = mlp()
    shardc.replicate(model[0])
    with pytest.warns(UserWarning, match="no annotation covers 2.weight and 1 more: gradients stay local over dp"):
        found = resolve(None, model, Mesh(dp=2))
    assert local(found) == {"2.weight", "2.bias"}


def test_frozen_parameters_outside_need_no_warning():
    model = mlp()
    shardc.replicate(model[0])
    model[2].requires_grad_(False)
    assert resolve(None, model, Mesh(dp=2)).params["2.weight"].notes == ()


@pytest.mark.parametrize("ignored", [lambda model: [model[0]], lambda model: ["0"]])
def test_ignored_modules_are_left_alone(ignored):
    model = mlp()
    shardc.replicate(model, ignored_modules=ignored(model))
    found = resolve(None, model, Mesh(dp=2))
    assert local(found) == {"0.weight", "0.bias"}
    assert found.params["0.weight"].notes == ("its gradient stays local over dp",)


def test_ignored_parameters_stay_whole():
    model = mlp()
    shardc.fully_shard(model, ignored_params=[model.get_parameter("0.weight")])
    found = resolve(None, model, Mesh(dp=2))
    assert found.params["0.weight"].stored.is_whole
    assert local(found) == {"0.weight"}


def test_patterns_of_an_annotation_begin_at_its_module():
    model = nn.ModuleDict({"a": mlp(), "b": mlp()})
    shardc.replicate(model["a"], ignored_modules=["0"])
    shardc.replicate(model["b"])
    found = resolve(None, model, Mesh(dp=2))
    assert local(found) == {"a.0.weight", "a.0.bias"}


def test_a_plan_wins_over_annotations_of_its_mesh_dims():
    model = shardc.fully_shard(mlp(), mesh_dim="dp")
    found = resolve(shardc.Plan(dp=Replicated()), model, Mesh(dp=2))
    assert found.params["0.weight"].stored.is_whole


def test_annotations_fill_the_mesh_dims_that_a_plan_leaves():
    model = shardc.fully_shard(mlp())
    found = resolve(shardc.Plan(tp={"0": "colwise"}), model, Mesh(dp=2, tp=2))
    assert found.params["0.weight"].stored.text() == "[8@tp.dp, 4]"
    assert list(found.params["0.weight"].keys) == ["tp", "dp"]


def test_without_names_an_annotation_means_the_only_mesh_dim():
    found = resolve(None, shardc.replicate(mlp()), Mesh(dim_0=2))
    assert found.data_axes == ("dim_0",)


def test_an_unknown_mesh_dim_is_refused_at_the_line_of_the_annotation():
    model = shardc.replicate(mlp(), mesh_dim="dpp")
    with pytest.raises(PlanError, match="names the mesh dim dpp, but the mesh has dp, tp") as caught:
        resolve(None, model, Mesh(dp=2, tp=2))
    assert caught.value.where.startswith("test_annotate.py:")
    assert caught.value.help == 'the nearest name is "dp"'


def test_an_annotation_that_no_mesh_dim_is_left_for_is_refused():
    model = shardc.replicate(mlp())
    with pytest.raises(PlanError, match="names the mesh dim dp, but the mesh has tp"):
        resolve({"0": "colwise"}, model, Mesh(tp=2))


def test_what_an_inner_module_ignores_is_the_outer_ones():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    shardc.fully_shard(model[1], ignored_params=list(model[1][1].parameters()))
    shardc.replicate(model)
    found = resolve(None, model, Mesh(dp=2)).params
    assert not any(layout.local for layout in found.values())
    assert [name for name, layout in found.items() if not layout.stored.is_whole] == ["1.0.weight", "1.0.bias"]
