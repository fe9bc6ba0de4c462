"""`shardc.hf.plan`: a model's own tp_plan becomes a plan, and adapters follow what they stand beside."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardc
import shardc.hf
from tests.acceptance.compare import compare

MESH = shardc.Mesh(dp=2, tp=2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Pretrained(nn.Module):
    """Says what transformers' PreTrainedModel says of itself."""

    def __init__(self, plan: dict[str, str] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 12, bias=False)
        self._own = {"layers.*.up": "colwise", "layers.*.down": "rowwise", "head": "colwise_gather_output"}
        self._own = self._own if plan is None else plan

    @property
    def tp_plan(self) -> dict[str, str]:
        return self._own

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Lora(nn.Module):
    """What peft puts in the place of a linear layer, with the names that it uses."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + 0.5 * self.lora_B["default"](self.lora_A["default"](x))


class Wrapper(nn.Module):
    """Hands on what it does not have, as peft's wrappers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, x):
        return self.model(x)


def with_lora(*layers: int) -> nn.Module:
    model = Pretrained().requires_grad_(False)
    for i in layers:
        block = model.layers[i]
        block.up, block.down = Lora(block.up), Lora(block.down)
    return Wrapper(model)


def test_the_models_own_lines_are_kept_and_the_batch_is_split_beside_them():
    assert repr(shardc.hf.plan(Pretrained())) == (
        'Plan(dp=Replicated(), tp={"layers.*.up": "colwise", "layers.*.down": "rowwise", '
        '"head": "colwise_gather_output"})'
    )


def test_lines_are_written_for_what_peft_wrapped_and_under_the_names_of_the_wrapper():
    assert shardc.hf.plan(with_lora(0, 1)).entries["tp"] == {
        "model.layers.*.up.base_layer": "colwise",
        "model.layers.*.up.lora_B.default": "colwise",
        "model.layers.*.down.base_layer": "rowwise",
        "model.layers.*.down.lora_A.default": "rowwise",
        "model.head": "colwise_gather_output",
    }


def test_where_one_layer_is_wrapped_and_another_is_not_each_has_its_own_lines():
    assert list(shardc.hf.plan(with_lora(1), dp=None).entries["tp"])[:3] == [
        "model.layers.0.up",
        "model.layers.1.up.base_layer",
        "model.layers.1.up.lora_B.default",
    ]


def test_a_module_whose_copy_is_trained_is_split_as_the_original():
    model = Pretrained()
    kept = nn.Module()
    kept.original_module, kept.modules_to_save = model.head, nn.ModuleDict({"default": copy.deepcopy(model.head)})
    model.head = kept
    lines = shardc.hf.plan(model).entries["tp"]
    assert {k: v for k, v in lines.items() if k.startswith("head")} == {
        "head.original_module": "colwise_gather_output",
        "head.modules_to_save.default": "colwise_gather_output",
    }


def test_a_line_of_the_model_that_names_nothing_in_it_is_left_out():
    assert shardc.hf.plan(Pretrained({"head": "colwise", "lm_head": "colwise"})).entries["tp"] == {"head": "colwise"}


@pytest.mark.parametrize("data", [None, shardc.FullyShard("model.layers.*")])
def test_adapters_train_as_on_one_device(data):
    torch.manual_seed(0)
    model = with_lora(0, 1)
    compare(model, shardc.hf.plan(model, data=data), MESH, torch.randn(4, 3, 8), steps=2)


def test_the_split_half_of_an_adapter_is_a_shard_and_the_other_is_whole():
    model = with_lora(0, 1)
    compiled = shardc.compile(model, shardc.hf.plan(model, dp=None), mesh=shardc.Mesh(tp=2))
    text = str(compiled.lower(torch.randn(4, 3, 8)))
    assert "f32[16@tp, 2] = param model.layers.0.up.lora_B.default.weight" in text
    assert "f32[2, 8] = param model.layers.0.up.lora_A.default.weight" in text
    assert "f32[2, 16@tp] = param model.layers.0.down.lora_A.default.weight" in text


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lambda: shardc.hf.plan(nn.Linear(2, 2)), "Linear has no tp_plan"),
        (lambda: shardc.hf.plan(Pretrained({})), "Pretrained has no tp_plan"),
        (lambda: shardc.hf.plan(Pretrained(), dp=None, data=shardc.Replicated()), "and dp is None"),
        (lambda: shardc.hf.plan(Pretrained(), data="dp"), "data is 'dp'"),
    ],
)
def test_what_makes_no_sense_is_refused(given, says):
    with pytest.raises(shardc.PlanError, match=says):
        given()


def test_a_llama_by_its_own_plan_is_as_on_one_device():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    assert "model.layers.*.self_attn.q_proj" in shardc.hf.plan(model).entries["tp"]
    ids = torch.randint(0, 32, (4, 6))
    whole = copy.deepcopy(model)(input_ids=ids, labels=ids).loss
    compiled = shardc.compile(model, shardc.hf.plan(model), mesh=MESH)
    torch.testing.assert_close(compiled(input_ids=ids, labels=ids).loss, whole)
