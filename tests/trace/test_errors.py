"""What cannot be traced is refused: what, at which line of the user's, and what to do. What is lost is reported."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shardc.compiler.errors import ShardingError
from shardc.compiler.trace import capture
from shardc.compiler.trace.layers import copy_layers
from shardc.compiler.trace.trace import trace

X = torch.randn(3, 4)
TABLE = nn.Parameter(torch.ones(4))


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.table, self.count, self.log = torch.zeros(4), 1, []


def line_of(comment: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(f"# {comment}"))


def refused(module: nn.Module, *args, **options) -> ShardingError:
    with pytest.raises(ShardingError) as caught:
        trace(module, args or (X,), **options)
    return caught.value


class Branch(Base):
    def forward(self, x):
        y = self.fc(x)
        if y.sum() > 0:  # branch
            y = -y
        return y


def test_the_whole_text_for_a_branch_on_a_tensor():
    error = refused(nn.Sequential(Branch()))
    assert str(error) == (
        "sharding error: forward depends on the value of a tensor, which is not known when tracing\n"
        f"  --> test_errors.py:{line_of('branch')} in forward\n"
        "   |           y = self.fc(x)\n"
        "   | >         if y.sum() > 0:  # branch\n"
        "   |               y = -y\n"
        "   = help: compute both sides and choose with torch.where, or move the branch out of forward; "
        "a size must be a Python number, not read from a tensor"
    )
    assert error.__cause__ is not None and type(error.__cause__).__module__.startswith("torch")


class Item(Base):
    def forward(self, x):
        return [self.fc(x)] * int(x.sum().item())  # item


class Select(Base):
    def forward(self, x):
        return self.fc(x)[x.sum(1) > 0].tolist()  # select


class Raises(Base):
    def forward(self, x):
        if x.shape[0] > 2:
            raise KeyError("at most 2 rows")  # raises
        return x


class Shapes(Base):
    def forward(self, x):
        return self.fc(x) @ torch.ones(3, 3)  # shapes


class Writes(Base):
    def forward(self, x):
        self.table.add_(1)  # writes
        return self.fc(x) + self.table


class Outside(Base):
    def forward(self, x):
        return self.fc(x) + TABLE  # outside


class Condition(Base):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))  # condition


class Spoils(Base):
    def forward(self, x):
        y = torch.exp(self.fc(x))
        y.add_(1)  # spoils
        return y


@pytest.mark.parametrize(
    "kind, where, what",
    [
        (Branch, "branch", "depends on the value of a tensor"),
        (Item, "item", "depends on the value of a tensor"),
        (Select, "select", "depends on the value of a tensor"),
        (Raises, "raises", "forward raises KeyError: 'at most 2 rows'"),
        (Shapes, "shapes", "forward raises RuntimeError: a and b must have same reduction dim"),
        (Writes, "writes", "changes a tensor in place that is no parameter, buffer or input"),
        (Outside, "outside", "requires grad but is no parameter or buffer of the module"),
        (Condition, "condition", "cond cannot be part of a sharded program"),
    ],
)
def test_the_user_s_line_is_named(kind, where, what):
    error = refused(kind())
    assert what in error.what and error.help
    assert error.where == f"test_errors.py:{line_of(where)} in forward"
    assert f"> {'        '}" in error.excerpt and f"# {where}" in error.excerpt


def test_a_tensor_that_gradients_need_and_forward_changes():
    assert "modified by an inplace operation" in refused(Spoils()).what


def test_a_constant_is_not_written_to_while_tracing():
    for script in (False, True):
        module = Writes()
        if script:  # traced by dispatch
            module.add_module("fc", torch.jit.script(module.fc))
        error = refused(module)
        assert "no parameter, buffer or input" in error.what and f":{line_of('writes')} " in error.where
        assert torch.equal(module.table, torch.zeros(4))


def test_an_attribute_without_data_is_named_by_line():
    class Offset(Base):
        def forward(self, x):
            return self.fc(x) + self.table

    module = Offset()
    module.table = torch.zeros(4, device="meta")
    error = refused(module)
    assert "a tensor on meta that is no parameter or buffer" in error.what and "in forward" in error.where
    assert module.table.is_meta


class Rebinds(Base):
    def forward(self, x):
        self.table = self.table + 1
        return self.fc(x) + self.table


class Replaces(nn.Module):
    def __init__(self, grow):
        super().__init__()
        self.register_buffer("seen", torch.zeros(4))
        self.seen: Any
        self.grow = grow

    def forward(self, x):
        self.seen = torch.cat([self.seen, x[0]]) if self.grow else None
        return x


def test_state_that_is_no_buffer_is_refused():
    assert str(refused(Rebinds())) == (
        "sharding error: forward reads the tensor table and sets it anew for the next call\n"
        "   = help: register table as a buffer"
    )


def test_an_input_that_changes_shape_is_refused():
    class Turns(nn.Module):
        def forward(self, x):
            return x.t_() + 1

    assert "in place of x, or changes its shape" in refused(Turns()).what


def test_a_generator_of_its_own_is_refused():
    class Draws(nn.Module):
        def forward(self, x):
            return x + torch.rand(4, generator=torch.Generator())

    assert "Generator" in refused(Draws()).what


@pytest.mark.parametrize("grow", [True, False])
def test_a_buffer_that_changes_shape_is_refused(grow):
    assert "another tensor in place of seen" in refused(Replaces(grow)).what


def test_gradients_cut_off_in_an_input_are_reported():
    class Fills(Base):
        def forward(self, x, cache):
            return cache.copy_(self.fc(x)) + 1

    trace(Fills().requires_grad_(False), (X, torch.zeros(3, 4)))
    with pytest.warns(UserWarning, match="values that require grad into cache: no gradient flows back"):
        trace(Fills(), (X, torch.zeros(3, 4)))


class Notes(Base):
    def __init__(self, what):
        super().__init__()
        self.what = what
        self.state = SimpleNamespace(steps=[], last=None)

    def forward(self, x):
        if self.what == "count":
            self.count += 1
        elif self.what == "log":
            self.log.append(1)
        elif self.what == "last":
            self.last = self.fc(x)
        elif self.what == "state":
            self.state.steps.append(self.fc(x))
            self.state.last = x
        return self.fc(x)


@pytest.mark.parametrize("what", ["count", "log", "last", "state"])
def test_what_forward_sets_on_modules_is_put_back_and_named(what):
    module = nn.Sequential(Notes(what))
    effects = trace(module, (X,)).signature.effects
    assert effects and all(effect.name.startswith(f"0.{what}") for effect in effects)
    assert (module[0].count, module[0].log, hasattr(module[0], "last")) == (1, [], False)
    assert module[0].state == SimpleNamespace(steps=[], last=None)


def test_a_buffer_registered_in_forward_is_refused():
    class Late(Base):
        def forward(self, x):
            self.register_buffer("late", x.sum())
            return x

    module = Late()
    assert "forward registers late" in refused(module).what
    assert not hasattr(module, "late")


@pytest.mark.parametrize("draw", [random.random, np.random.rand])
def test_numbers_drawn_outside_torch_are_refused(draw):
    class Skips(Base):
        def __init__(self):
            super().__init__()
            self.fc = torch.jit.script(self.fc)  # traced by dispatch

        def forward(self, x):
            return self.fc(x) if draw() < 2 else x

    states = random.getstate(), str(np.random.get_state())
    assert "with Python or numpy" in refused(Skips()).what
    assert (random.getstate(), str(np.random.get_state())) == states


def test_python_s_random_is_refused_where_dynamo_is_asked_first():
    class Skips(Base):
        def forward(self, x):
            return self.fc(x) if random.random() < 2 else x

    assert "with Python or numpy" in refused(Skips()).what


def test_an_input_changed_in_place_and_given_twice():
    class Adds(nn.Module):
        def forward(self, a, b):
            return a.add_(b)

    assert "changes a in place, and was given the same tensor twice" in refused(Adds(), X, X).what


class Foreign:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def test_an_output_of_a_foreign_type():
    class Wraps(Base):
        def forward(self, x):
            return {"y": Foreign(self.fc(x))}

    error = refused(Wraps())
    assert "output['y'] is a Foreign" in error.what and "register_dataclass" in error.help


@pytest.mark.parametrize(
    "value, what",
    [
        (np.ones((3, 4)), "x['a'] is a numpy ndarray"),
        (torch.eye(4).to_sparse(), "x['a'] is a sparse_coo tensor"),
    ],
)
def test_inputs_that_are_no_dense_tensors(value, what):
    class First(nn.Module):
        def forward(self, x):
            return x["a"]

    assert refused(First(), {"a": value}).what == what


def test_a_lazy_module():
    assert "has no shape yet" in refused(nn.Sequential(nn.LazyLinear(4))).what


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("it is there")
    from shardc.compiler.ir.signature import TensorInfo

    params = {"weight": TensorInfo((4, 4), (4, 1), torch.float32, torch.device("cuda:0"), True)}
    assert "on cuda:0, and there is no such device" in refused(nn.Linear(4, 4), params=params).what


def test_a_python_module_in_a_scripted_one():
    module = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    module._modules._python_modules["extra"] = nn.Linear(4, 4)
    with pytest.raises(RuntimeError, match="has a Python module"):
        trace(nn.Sequential(module), (X,))


class Unreadable(Base):
    @torch.compiler.disable
    def scaled(self, x):
        return x * self.count

    def forward(self, x):
        return self.scaled(self.fc(x))


def test_what_is_traced_by_dispatch_says_so_and_why():
    scripted = torch.jit.script(nn.Linear(4, 4))
    assert trace(Base().fc, (X,)).signature.notes == ()
    for module, why in ((scripted, "it holds a scripted module"), (Unreadable(), "torch.compiler.disable")):
        (note,) = trace(module, (X,)).signature.notes
        assert note.startswith("traced by dispatch, where forward runs once: ") and why in note


@pytest.mark.parametrize(
    "place, name",
    [(copy_layers, "repeats"), (copy_layers, "joint_graph"), (capture, "opened"), (capture, "read_bytecode")],
)
def test_a_fault_of_its_own_is_no_reason_to_trace_another_way(monkeypatch, place, name):
    monkeypatch.setattr(place, name, None)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        trace(Base().fc, (X,))
