"""passes/regather_in_backward.py: freed parameters are gathered twice; kept ones, and one-sided uses, once."""

import copy

import pytest
import torch
from torch import nn

import shardc


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Scaled(nn.Module):
    """Backward does not need the parameter itself: the gradient of a sum is the other operand's."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x + self.shift


def compiled(model, ranks=2, **options):
    plan = shardc.Plan(dp=shardc.FullyShard(**options))
    return shardc.compile(model, plan, mesh=shardc.Mesh(dp=ranks))


def gathered(model, x, **options):
    program = compiled(model, **options).lower(x)
    program.verify(x)
    found = [c for c in program.collectives() if c.kind == "all_gather"]
    return tuple(sum(c.numel for c in found if c.phase == phase) for phase in ("forward", "backward"))


def test_a_freed_weight_is_gathered_again_and_the_bias_is_not():
    # the second layer's weight alone is needed for a gradient that goes on (the input needs none)
    assert gathered(Stack(), torch.randn(4, 6)) == (70 + 66, 60)


def test_every_weight_is_gathered_again_where_the_input_needs_its_gradient():
    assert gathered(Stack(), torch.randn(4, 6).requires_grad_()) == (136, 60 + 60)


def test_left_alone_where_parameters_are_kept():
    assert gathered(Stack(), torch.randn(4, 6).requires_grad_(), reshard_after_forward=False) == (136, 0)


def test_left_alone_where_backward_does_not_use_it():
    assert gathered(Scaled(), torch.randn(4, 6).requires_grad_()) == (6, 0)
    program = compiled(Scaled(), 4, reshard_after_forward=2).lower(torch.randn(4, 6).requires_grad_())
    assert "local_slice" not in str(program)  # so nothing is kept


def test_forward_keeps_its_piece_over_some_ranks_and_hands_nothing_else_on():
    program = compiled(Stack(), 4, reshard_after_forward=2).lower(torch.randn(4, 6).requires_grad_())
    lines = [line.split("  #")[0] for line in str(program).splitlines() if "dp/2" in line]
    assert lines == [
        "%local_slice: f32[10@dp/2, 6] = shardc.local_slice(%getitem, 0, dp/2)",
        "%local_slice_1: f32[6@dp/2, 10] = shardc.local_slice(%getitem_2, 0, dp/2)",
        "%all_gather_7: (f32[6, 10], f32[10, 6]) = shardc.all_gather([%local_slice_1, %local_slice], [0, 0], dp/2)",
    ]
    assert {"local_slice", "local_slice_1"} < set(program.halves.saved)
    assert not any("getitem" in name or "gather" in name for name in program.halves.saved)


def test_nothing_gathered_for_forward_is_handed_to_backward():
    program = compiled(Stack()).lower(torch.randn(4, 6).requires_grad_())
    joint = {n.name: n for n in program.gm.graph.nodes}
    held = [joint[name] for name in program.halves.saved]

    def from_gather(node):
        while node.op == "call_function" and node.all_input_nodes:
            if node.target.__name__ == "all_gather":
                return True
            if not str(node.target).startswith(("aten.t.", "aten.view", "aten.reshape")):
                return False
            node = node.all_input_nodes[0]
        return False

    assert held and not any(from_gather(n) for n in held)


@pytest.mark.parametrize("keep", [True, False])
def test_gradients_equal_one_device(keep):
    model = Stack()
    alone, x = copy.deepcopy(model), torch.randn(4, 6)
    made = compiled(model, reshard_after_forward=keep)
    made(x).square().sum().backward()
    alone(x).square().sum().backward()
    for name, p in made.named_parameters():
        torch.testing.assert_close(p.grad, alone.get_parameter(name).grad)


def backward_gathers(model, unit, x, **options):
    """(numel, mesh dim) of what backward gathers, one name being a unit and the root having the rest."""
    plan = shardc.Plan(dp=shardc.FullyShard(unit, **options))
    program = shardc.compile(model, plan, mesh=shardc.Mesh(dp=4)).lower(x)
    program.verify(x)
    return [(c.numel, c.mesh_dim) for c in program.collectives() if c.kind == "all_gather" and c.phase == "backward"]


def test_what_the_root_has_behind_the_units_is_held_for_backward():
    assert backward_gathers(Stack(), "first", torch.randn(4, 6).requires_grad_()) == [(60, "dp")]  # of the unit


def test_of_the_root_what_lies_before_the_units_is_gathered_again():
    assert backward_gathers(Stack(), "second", torch.randn(4, 6).requires_grad_()) == [(60, "dp")] * 2


def test_a_unit_is_gathered_again_also_behind_all_others():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    assert backward_gathers(model, "*", torch.randn(4, 6).requires_grad_()) == [(36, "dp")] * 2


def test_of_the_root_too_a_piece_is_kept_where_the_plan_says_of_how_many_ranks():
    found = backward_gathers(Stack(), "first", torch.randn(4, 6).requires_grad_(), reshard_after_forward=2)
    assert found == [(60, "dp/2")] * 2


def test_tied_at_both_ends_of_the_root_is_held():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.ends, self.middle = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)

        def forward(self, x):
            return self.ends(torch.relu(self.middle(self.ends(x))))

    assert backward_gathers(Tied(), "middle", torch.randn(4, 6)) == [(36, "dp")]
