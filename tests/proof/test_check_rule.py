"""Users' own operators: rules in a line, proved by running, found by running, used by compile."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard

import shardc
from shardc.compiler.rules.ops import all_rules  # noqa: F401  filled before any test takes its snapshot
from shardc.compiler.rules.table import TABLE, overload

aten = torch.ops.aten


@torch.library.custom_op("shardc_test::scale_rows", mutates_args=())
def scale_rows(x: Tensor, s: Tensor) -> Tensor:
    return x * s[:, None]


@scale_rows.register_fake
def _(x, s):
    return torch.empty_like(x)


scale_rows.register_autograd(
    lambda ctx, g: (scale_rows(g, ctx.saved_tensors[1]), (g * ctx.saved_tensors[0]).sum(1)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("shardc_test::sum_and_top", mutates_args=())
def sum_and_top(xs: list[Tensor], *, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    total = torch.stack(xs).sum(0) + shift
    return total, total.amax(1)


@sum_and_top.register_fake
def _(xs, *, shift=0.0):
    return torch.empty_like(xs[0]), xs[0].new_empty(xs[0].shape[0])


@pytest.fixture
def registered():
    """Registers rules for one test and takes them away again."""
    known = dict(TABLE)
    yield shardc.rule
    TABLE.clear()
    TABLE.update(known)


def test_a_right_rule_is_proved_for_every_factor_and_pending_sum(registered):
    registered(scale_rows, "n d, n -> n d", linear="0 | 1")
    proved = shardc.check_rule(scale_rows, torch.randn(5, 3), torch.randn(5))
    assert "splitting n over 3 ranks" in proved and "a pending sum in operands [1] over 2 ranks" in proved


def test_list_and_keyword_arguments_and_several_results_are_proved(registered):
    registered(sum_and_top, "n d, n d -> n d, n", whole="d")
    proved = shardc.check_rule(sum_and_top, [torch.randn(7, 3), torch.randn(7, 3)], shift=1.0)
    assert proved == [f"splitting n over {n} ranks" for n in (2, 3, 4)]


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("n d, m -> n d", {"whole": "m"}),  # rows without their scales
        ("n d, n -> n d", {"linear": "0 1"}),  # linear in each, not in both
        ("n d, d -> n d", {}),  # swapped factors
    ],
)
def test_a_wrong_rule_is_refused(registered, text, options):
    registered(scale_rows, text, **options)
    with pytest.raises(shardc.ShardingError, match="the rule of shardc_test.scale_rows.default is wrong"):
        shardc.check_rule(scale_rows, torch.randn(4, 4), torch.randn(4))


def test_an_operator_without_a_rule_is_named():
    with pytest.raises(shardc.ShardingError, match="scale_rows.default has no sharding rule"):
        shardc.check_rule(scale_rows, torch.randn(4, 4), torch.randn(4))


@pytest.mark.parametrize(
    ("op", "args", "line"),
    [
        (scale_rows, ((6, 4), (6,)), 'shardc.rule("shardc_test::scale_rows", "a b, a -> a b")'),
        (aten.mm, ((6, 4), (4, 8)), 'shardc.rule("aten::mm", "a b, b c -> a c", sum="b")'),
        (aten.bmm, ((2, 6, 4), (2, 4, 8)), 'shardc.rule("aten::bmm", "a b c, a c d -> a b d", sum="c")'),
    ],
)
def test_a_rule_is_found_by_running(capsys, op, args, line):
    assert shardc.discover_rule(op, *(torch.randn(s) for s in args)) == line
    assert capsys.readouterr().out.strip() == line


def test_what_cannot_be_split_is_found_whole():
    line = shardc.discover_rule(aten.cumsum, torch.randn(6, 4), 0)
    assert line == 'shardc.rule("aten::cumsum", "b a -> c a", whole="b c")'


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return x @ scale_rows(self.weight, self.scale).t()


@pytest.mark.parametrize("with_rule", [True, False])
def test_compile_shards_an_operator_by_its_rule_and_runs_it_whole_without(registered, with_rule):
    if with_rule:
        registered(scale_rows, "n d, n -> n d", linear="0 | 1")
    model = Scaled()
    alone, x = copy.deepcopy(model), torch.randn(3, 4)
    plan = {"weight": Shard(0), "scale": Shard(0)}
    compiled = shardc.compile(model, plan, mesh=shardc.Mesh(tp=2))
    out, want = compiled(x), alone(x)
    out.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(out, want)
    for name, p in compiled.named_parameters():
        torch.testing.assert_close(p.grad, alone.get_parameter(name).grad)
    program = compiled.programs[-1]
    assert bool(program.notes()) != with_rule
    gathers = [c for c in program.collectives() if c.kind == "all_gather" and c.numel in (24, 6)]
    assert bool(gathers) != with_rule
    assert overload(scale_rows) == torch.ops.shardc_test.scale_rows.default


def test_strict_refuses_an_operator_without_a_rule_and_prints_the_line_to_add():
    plan = {"weight": Shard(0), "scale": Shard(0)}
    compiled = shardc.compile(Scaled(), plan, mesh=shardc.Mesh(tp=2), strict=True)
    with pytest.raises(shardc.ShardingError, match=r"shardc\.rule\(.*scale_rows"):
        compiled(torch.randn(3, 4))
