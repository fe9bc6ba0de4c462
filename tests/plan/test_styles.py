"""torch's style objects and the strings of tp_plan: what each says of parameters and of values at borders."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn
from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

from shardc import Mesh, Plan, PlanError
from shardc.compiler.ir.marks import placement_text
from shardc.compiler.plan.resolve import resolve
from shardc.compiler.plan.resolved import Resolved
from shardc.compiler.plan.styles import REFUSED_STRINGS, STRINGS, read_style, style_text

TP = Mesh(tp=2)


class Conv1D(nn.Module):
    """The Linear of GPT-2: its weight is (in, out)."""

    def __init__(self, out: int, into: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(into, out)), nn.Parameter(torch.zeros(out))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 6))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 16, 6))
        self.down_proj = nn.Parameter(torch.zeros(4, 6, 8))


def one(module: nn.Module, wish: object) -> Resolved:
    return resolve({"m": wish}, nn.ModuleDict({"m": module}), TP)


def text(placement: Placement | None) -> str:
    return "-" if placement is None else placement_text(placement)


def shown(found: Resolved) -> str:
    """Parameters that are split, then borders: what is declared -> desired, and `!` where explicit."""
    params = [
        f"{fqn.removeprefix('m.')}: S({layout.stored.dim_of('tp')}){' open' if layout.open else ''}"
        for fqn, layout in found.params.items()
        if not layout.stored.is_whole
    ]
    borders = [
        f"{b.side} {b.index}: {text(b.declared)} -> {text(b.desired)}"
        f"{' open' if b.open else ''}{' !' if b.explicit else ''}"
        for b in found.borders
    ]
    return "; ".join(params) + " | " + "; ".join(borders)


CUT = {
    "linear, columns": (
        nn.Linear(4, 6),
        ColwiseParallel(),
        "weight: S(0) open; bias: S(0) open | in 0: R -> R open; out None: - -> S(-1) open",
    ),
    "linear, rows": (
        nn.Linear(4, 6),
        RowwiseParallel(),
        "weight: S(1) open | in 0: S(-1) -> S(-1) open; out None: - -> R open",
    ),
    "linear, columns, layouts given": (
        nn.Linear(4, 6, bias=False),
        ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate(), use_local_output=False),
        "weight: S(0) open | in 0: S(0) -> R open !; out None: - -> R !",
    ),
    "linear, rows, layouts given": (
        nn.Linear(4, 6, bias=False),
        RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "weight: S(1) open | in 0: R -> S(-1) open !; out None: - -> S(1) !",
    ),
    "a given layout that is the default is not explicit": (
        nn.Linear(4, 6, bias=False),
        ColwiseParallel(output_layouts=Shard(-1)),
        "weight: S(0) open | in 0: R -> R open; out None: - -> S(-1) open",
    ),
    "embedding, columns": (
        nn.Embedding(5, 6),
        ColwiseParallel(),
        "weight: S(1) open | in 0: R -> R open; out None: - -> S(-1) open",
    ),
    "embedding, rows": (
        nn.Embedding(5, 6),
        RowwiseParallel(input_layouts=Replicate()),
        "weight: S(0) open | in 0: R -> R open !; out None: - -> R open",
    ),
    "the default of rows is no claim that tokens are sliced": (
        nn.Embedding(5, 6),
        RowwiseParallel(),
        "weight: S(0) open | in 0: R -> R open; out None: - -> R open",
    ),
    "Conv1D, columns": (
        Conv1D(6, 4),
        ColwiseParallel(),
        "weight: S(1) open; bias: S(0) open | in 0: R -> R open; out None: - -> S(-1) open",
    ),
    "Conv1D, rows": (
        Conv1D(6, 4),
        "rowwise",
        "weight: S(0) open | in 0: S(-1) -> S(-1) open; out None: - -> R open",
    ),
    "convolution, columns": (
        nn.Conv2d(4, 6, 3),
        ColwiseParallel(),
        "weight: S(0) open; bias: S(0) open | in 0: R -> R open; out None: - -> S(-3) open",
    ),
    "convolution, rows": (
        nn.Conv1d(4, 6, 3),
        RowwiseParallel(),
        "weight: S(1) open | in 0: S(-2) -> S(-2) open; out None: - -> R open",
    ),
    "transposed convolution, columns": (
        nn.ConvTranspose2d(4, 6, 3, bias=False),
        ColwiseParallel(),
        "weight: S(1) open | in 0: R -> R open; out None: - -> S(-3) open",
    ),
    "convolution of groups, columns": (
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
        ColwiseParallel(),
        "weight: S(0) open | in 0: R -> R open; out None: - -> S(-3) open",
    ),
    "attention": (
        nn.MultiheadAttention(8, 2),
        ColwiseParallel(),
        "in_proj_weight: S(0) open; in_proj_bias: S(0) open; out_proj.weight: S(1) open | "
        "in 0: R -> R open; in 1: R -> R open; in 2: R -> R open; out 0: - -> R open",
    ),
    "attention with other widths": (
        nn.MultiheadAttention(8, 2, bias=False, kdim=4, vdim=6, add_bias_kv=True),
        ColwiseParallel(),
        "q_proj_weight: S(0) open; k_proj_weight: S(0) open; v_proj_weight: S(0) open; bias_k: S(2) open; "
        "bias_v: S(2) open; out_proj.weight: S(1) open | "
        "in 0: R -> R open; in 1: R -> R open; in 2: R -> R open; out 0: - -> R open",
    ),
    "norm along the sequence": (
        nn.LayerNorm(6),
        SequenceParallel(),
        " | in 0: S(1) -> S(1) open; out None: - -> S(1) open",
    ),
    "dropout along another dim": (
        nn.Dropout(),
        SequenceParallel(sequence_dim=0),
        " | in 0: S(0) -> S(0) open; out None: - -> S(0) open",
    ),
}


@pytest.mark.parametrize("case", CUT)
def test_styles_on_modules(case: str):
    module, style, expected = CUT[case]
    assert shown(one(module, style)) == expected


STRING_CASES = {
    "colwise": CUT["linear, columns"][2],
    "colwise_rep": "weight: S(0) open; bias: S(0) open | in 0: R -> R open; out None: - -> R !",
    "colwise_gather_output": "weight: S(0) open; bias: S(0) open | in 0: R -> R open; out None: - -> R !",
    "packed_colwise": CUT["linear, columns"][2],
    "rowwise": CUT["linear, rows"][2],
    "rowwise_rep": "weight: S(1) open | in 0: R -> S(-1) open !; out None: - -> R open",
    "rowwise_split_input": "weight: S(1) open | in 0: R -> S(-1) open !; out None: - -> R open",
    "packed_rowwise": CUT["linear, rows"][2],
    "embedding_rowwise": "weight: S(0) open | in 0: R -> R open; out None: - -> R open",
    "embedding_colwise": "weight: S(1) open | in 0: R -> R open; out None: - -> R !",
    "sequence_parallel": " | in 0: S(1) -> S(1) open; out None: - -> S(1) open",
    "replicate": " | ",
    "replicated_with_grad_allreduce": " | ",
    "mla_kv_a_proj": " | ",
    "all_reduce": " | out None: - -> R !",
    "moe_tp_experts": " | out None: - -> R !",
    "moe_identity_expert": " | ",
    "local_params": " | ",
}


@pytest.mark.parametrize("string", STRINGS)
def test_strings(string: str):
    module = nn.Embedding(5, 6) if string.startswith("embedding") else nn.Linear(4, 6)
    assert shown(one(module, string)) == STRING_CASES[string]


def test_all_strings_of_tp_plan_are_read_or_refused_by_name():
    strings = {
        *("colwise", "colwise_rep", "colwise_gather_output", "rowwise", "rowwise_rep", "rowwise_split_input"),
        *("packed_colwise", "packed_rowwise", "embedding_rowwise", "embedding_colwise", "sequence_parallel"),
        *("replicated_with_grad_allreduce", "mla_kv_a_proj", "all_reduce", "moe_tp_experts", "local_params"),
        *("moe_identity_expert", "replicate", "grouped_gemm", "ep_dispatch_experts"),
    }
    assert len(strings) == 20 and strings <= {*STRINGS, *REFUSED_STRINGS}


def test_a_string_may_mean_a_module_of_its_own_around_one_matrix():
    assert shown(one(Router(), "colwise_rep")) == "weight: S(0) open | in 0: R -> R open; out None: - -> R !"


def test_strings_name_parameters_too():
    plan = {
        "m.gate_up_proj": "packed_colwise",
        "m.down_proj": "rowwise",
        "m": "moe_tp_experts",
    }
    found = resolve(plan, nn.ModuleDict({"m": Experts()}), TP)
    assert shown(found) == "gate_up_proj: S(1) open; down_proj: S(2) open | out None: - -> R !"


@pytest.mark.parametrize(
    "string, shape, layout",
    [
        ("colwise", (6, 4), "[6@tp, 4]"),
        ("colwise", (6,), "[6@tp]"),
        ("rowwise", (6, 4), "[6, 4@tp]"),
        ("rowwise", (6,), "[6]"),
        ("packed_rowwise", (3, 6, 4), "[3, 6, 4@tp]"),
        ("embedding_rowwise", (6, 4), "[6@tp, 4]"),
        ("embedding_colwise", (6, 4), "[6, 4@tp]"),
        ("replicate", (6, 4), "[6, 4]"),
        ("colwise", (), "[]"),
    ],
)
def test_a_string_on_a_parameter_goes_by_its_dims(string: str, shape: tuple[int, ...], layout: str):
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(shape))
    assert resolve({"w": string}, model, TP).params["w"].stored.text() == layout


class Block(nn.Module):
    def forward(self, x, y, mask=None, *, scale=1.0):
        return x, y


def test_prepared_inputs_and_outputs():
    inputs = PrepareModuleInput(
        input_layouts=(Shard(0), None),
        desired_input_layouts=(Replicate(), None),
        input_kwarg_layouts={"mask": Shard(1), "scale": Partial()},
        desired_input_kwarg_layouts={"mask": Replicate(), "scale": Replicate()},
    )
    outputs = PrepareModuleOutput(output_layouts=(None, Shard(0)), desired_output_layouts=(Shard(1), Replicate()))
    assert shown(one(Block(), inputs)) == " | in 0: S(0) -> R !; in mask: S(1) -> R !; in scale: P(sum) -> R !"
    assert shown(one(Block(), outputs)) == " | out 1: S(0) -> R !"
    both = PrepareModuleInputOutput(
        input_layouts=(Shard(0), Replicate()),
        desired_input_layouts=(None, Shard(0)),
        output_layouts=Shard(0),
        desired_output_layouts=Replicate(),
    )
    assert shown(one(Block(), both)) == " | in 0: S(0) -> - !; in 1: R -> S(0) !; out None: S(0) -> R !"
    assert one(Block(), both).counts == {("m", "in"): 2, ("m", "out"): 1}


def test_values_at_borders_are_found_by_position_or_name():
    style = PrepareModuleInput(
        input_layouts=(Shard(0), None),
        desired_input_layouts=(Replicate(), None),
        input_kwarg_layouts={"mask": Shard(1)},
        desired_input_kwarg_layouts={"mask": Replicate()},
    )
    found = one(Block(), style)
    at = {path: [b.index for b in found.at(f"m|in|{path}")] for path in ("0", "0['a']", "1", "kw:x", "kw:mask", "2")}
    assert at == {"0": [0], "0['a']": [0], "1": [], "kw:x": [0], "kw:mask": ["mask"], "2": ["mask"]}
    assert found.at("other|in|0") == [] == found.at("m|out|")


def test_results_at_borders_are_found_by_position():
    several = PrepareModuleOutput(output_layouts=(None, Shard(0)), desired_output_layouts=(Shard(1), Replicate()))
    assert [len(one(Block(), several).at(f"m|out|{path}")) for path in ("0", "1", "")] == [0, 1, 0]
    found = one(nn.Linear(4, 6), ColwiseParallel())
    assert [len(found.at(f"m|out|{path}")) for path in ("", "0", "1", "['a']")] == [1, 1, 1, 1]


def test_other_counts_at_a_call_are_refused_with_both_counts():
    style = PrepareModuleInput(input_layouts=(Shard(0), None), desired_input_layouts=(Replicate(), None))
    found = one(Block(), style)
    found.check_count("m", "in", 2)
    found.check_count("m", "out", 7)
    with pytest.raises(ValueError, match="m has 3 positional arguments, but its layouts are for 2"):
        found.check_count("m", "in", 3)


class Own(ColwiseParallel):
    pass


class Foreign(ParallelStyle):
    def _apply(self, module, device_mesh):
        return module


class LoRA(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 4)
        self.down = nn.Linear(4, 2)


def refusal(module: nn.Module, wish: object) -> str:
    with pytest.raises(PlanError) as caught:
        one(module, wish)
    return f"{caught.value.what}\n  {caught.value.help}"


def test_what_a_style_cannot_do_is_refused_by_name():
    prepare = PrepareModuleInput
    wide = (Shard(0),) * 4
    cases = [
        (nn.ReLU(), ColwiseParallel()),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), RowwiseParallel()),
        (LoRA(), "colwise"),
        (nn.LSTM(2, 2), ColwiseParallel()),
        (nn.LayerNorm(4), ColwiseParallel()),
        (nn.TransformerEncoderLayer(4, 2, 4), ColwiseParallel()),
        (nn.MultiheadAttention(4, 2), RowwiseParallel()),
        (nn.Conv2d(4, 4, 3, groups=2), RowwiseParallel()),
        (nn.ConvTranspose2d(4, 4, 3, groups=2), ColwiseParallel()),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), ColwiseParallel()),
        (nn.Linear(2, 2), "grouped_gemm"),
        (nn.Linear(2, 2), "collwise"),
        (nn.Linear(2, 2), "auto"),
        (nn.Linear(2, 2), Own()),
        (nn.Linear(2, 2), Foreign()),
        (nn.Linear(2, 2), ColwiseParallel(input_layouts=(Shard(0), None))),  # type: ignore[arg-type]
        (nn.Linear(2, 2), RowwiseParallel(output_layouts=0.5)),  # type: ignore[arg-type]
        (Block(), prepare(input_layouts=wide, desired_input_layouts=wide)),
        (Block(), prepare(input_layouts=wide[:1], desired_input_layouts=wide[:1])),
        (
            Block(),
            prepare(input_kwarg_layouts={"maks": Shard(0)}, desired_input_kwarg_layouts={"maks": Replicate()}),
        ),
        (Block(), prepare(input_kwarg_layouts={"x": Shard(0)}, desired_input_kwarg_layouts={"y": Shard(0)})),
    ]
    assert_expected_inline(
        "\n".join(refusal(module, wish) for module, wish in cases),
        """\
tp["m"] = ColwiseParallel() names m, a ReLU, which has no parameters to split
  leave it out, or lay out what passes through it with PrepareModuleInputOutput
tp["m"] = RowwiseParallel() names m, a Sequential with no parameters of its own
  name modules inside it: m.0, m.2
tp["m"] = "colwise" names m, a LoRA with no parameters of its own
  name modules inside it: m.base, m.down
tp["m"] = ColwiseParallel() names m, a LSTM, whose columns and rows are not known
  give its parameters placements, such as Shard(0): m.weight_ih_l0, m.weight_hh_l0, m.bias_ih_l0 and 1 more
tp["m"] = ColwiseParallel() names m, a LayerNorm, whose columns and rows are not known
  give its parameters placements, such as Shard(0): m.weight, m.bias
tp["m"] = ColwiseParallel() names m, a TransformerEncoderLayer with no parameters of its own
  name modules inside it: m.self_attn, m.linear1, m.linear2
tp["m"] = RowwiseParallel() names m, a MultiheadAttention, which has no rows: it is several matrices
  ColwiseParallel() splits its heads, and its out_proj by rows
tp["m"] = RowwiseParallel() names m, a Conv2d of 2 groups, whose weight mixes groups and channels
  use ColwiseParallel() here
tp["m"] = ColwiseParallel() names m, a ConvTranspose2d of 2 groups, whose weight mixes groups and channels
  use RowwiseParallel() here
tp["m"] = ColwiseParallel() names m, a ParametrizedLinear that computes its weight
  give placements to m.parametrizations.weight.original0, m.parametrizations.weight.original1
tp["m"] = "grouped_gemm": experts dealt out to ranks are not supported
  split every expert instead: give its parameters, by name, a placement on a dim but 0
tp["m"] = "collwise" is not a string of tp_plan
  the nearest is "colwise"
tp["m"] = "auto" is no style
  pass the dict model.tp_plan
tp["m"] is a Own, a subclass of ColwiseParallel
  use ColwiseParallel itself: what a subclass does at run time is not read
tp["m"] is a Foreign, which is no style
  write a style of torch.distributed.tensor.parallel or a string of tp_plan
tp["m"]: input_layouts of ColwiseParallel has 2 layouts for 1 tensor
  give one placement; PrepareModuleInput takes a layout for each input
tp["m"]: output_layouts holds 0.5
  a layout is a torch placement: Shard(dim), Replicate() or Partial()
tp["m"]: input_layouts has 4 layouts, but forward of m takes 2 to 3 positional arguments
  give one layout for each, None for what is left alone
tp["m"]: input_layouts has 1 layouts, but forward of m takes 2 to 3 positional arguments
  give one layout for each, None for what is left alone
tp["m"]: input_kwarg_layouts names maks, which forward of m does not take
  the nearest name is "mask"
tp["m"]: desired_input_kwarg_layouts names y, which input_kwarg_layouts does not
  give both dicts the same names""",
    )


@pytest.mark.parametrize(
    "style, text",
    [
        (ColwiseParallel(), "ColwiseParallel()"),
        (RowwiseParallel(input_layouts=Replicate()), "RowwiseParallel(input_layouts=Replicate())"),
        (SequenceParallel(sequence_dim=0), "SequenceParallel(sequence_dim=0)"),
        (
            PrepareModuleInput(input_layouts=(Shard(0), None), desired_input_layouts=(Replicate(), None)),
            "PrepareModuleInput(input_layouts=(Shard(0), None), desired_input_layouts=(Replicate(), None))",
        ),
        (
            PrepareModuleInputOutput(
                input_kwarg_layouts={"x": Shard(0)},
                desired_input_kwarg_layouts={"x": Replicate()},
                output_layouts=Partial(),
                desired_output_layouts=Shard(0),
            ),
            'PrepareModuleInputOutput(input_kwarg_layouts={"x": Shard(0)}, '
            'desired_input_kwarg_layouts={"x": Replicate()}, '
            "output_layouts=Partial(), desired_output_layouts=Shard(0))",
        ),
        ("colwise", '"colwise"'),
    ],
)
def test_styles_write_themselves_without_their_defaults(style, text: str):
    assert style_text(style) == text


def test_styles_with_the_same_options_wish_the_same():
    def same(a: object, b: object) -> bool:
        return read_style(a, "tp") == read_style(b, "tp")

    assert same(ColwiseParallel(), ColwiseParallel(use_local_output=False))
    assert not same(ColwiseParallel(), ColwiseParallel(output_layouts=Replicate()))
    assert not same(ColwiseParallel(), RowwiseParallel())
    assert not same(Shard(0), Shard(1)) and same("colwise", "colwise")


def test_a_style_is_not_changed_by_being_read():
    style = RowwiseParallel()
    before = dict(vars(style))
    read_style(style, "tp")
    one(nn.Linear(4, 4), style)
    assert vars(style) == before


def test_use_local_output_says_nothing():
    local, global_ = (ColwiseParallel(use_local_output=x) for x in (True, False))
    assert one(nn.Linear(4, 4), local).borders == one(nn.Linear(4, 4), global_).borders


def test_a_style_for_the_root():
    found = resolve(Plan(tp=ColwiseParallel()), nn.Linear(4, 6), TP)
    assert found.marked == ("",) and found.params["weight"].stored.text() == "[6@tp, 4]"
