"""What ranks repeat and move where layouts are chosen, on 4 simulated ranks: counts, which no machine changes.

    .venv/bin/python -m pip install -e '.[hf]'      published models, with random weights
    .venv/bin/python benchmarks/decisions.py        a table: work over one device's, bytes over the least, the gap

The least, per rank, of n ranks: gradients of P bytes of parameters that every rank holds whole take 2 (n-1)/n P. A
sequence that is split takes, of keys and values of A bytes each in a layer, two gathers in forward and two
reduce-scatters in backward, (n-1)/n A each. Messages between nodes of N bytes take a gather of the nodes and a
reduce-scatter of the sums, in forward and in backward, (n-1)/n N each. A contrastive loss takes a gather of one side's
features in forward and in backward, and a reduce-scatter. Products in columns and rows take an all-reduce of the
activations, 2 (n-1)/n A, at the end of each pair in forward, and at its beginning in backward where a gradient goes on.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardc
from shardc import Mesh, Program, Replicated

N = 4
SHARE = (N - 1) / N
ROWS, LENGTH, WIDTH, HEADS, LAYERS = 4, 32, 64, 4, 2
SPLIT = {"inputs": Shard(1), "outputs": Shard(1)}


class Block(nn.Module):
    """One causal block with fused queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.after, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4).unbind()
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, d))
        return x + self.down(nn.functional.gelu(self.up(self.after(x))))


class Messages(nn.Module):
    """A layer of a graph network."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(WIDTH, WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        found = torch.zeros_like(x).index_add(0, end, torch.relu(self.message(x))[begin])
        return self.update(torch.cat([x, found], -1))


def gradients(model: nn.Module) -> float:
    return 2 * SHARE * sum(p.numel() * p.element_size() for p in model.parameters())


def activation() -> float:
    return ROWS * LENGTH * WIDTH * 4.0


def llama() -> tuple[Program, float]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, use_cache=False,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(config), torch.randint(128, (ROWS, LENGTH))
    logits = SHARE * ROWS * LENGTH * 128 * 4  # which the caller gets whole
    least = gradients(model) + LAYERS * 4 * SHARE * activation() + logits
    sides = {"input_ids": Shard(1), "labels": Shard(1)}
    made = shardc.compile(model, None, mesh=Mesh(cp=N), inputs=sides).lower(input_ids=ids, labels=ids)
    return made, least


def block() -> tuple[Program, float]:
    model = Block()
    made = shardc.compile(model, None, mesh=Mesh(cp=N), **SPLIT).lower(torch.randn(ROWS, LENGTH, WIDTH))
    return made, gradients(model) + 4 * SHARE * activation()


def graph() -> tuple[Program, float]:
    model, nodes, edges = Messages(), 64, 256
    ends = [torch.randint(nodes, (edges,)) for _ in range(2)]
    made = shardc.compile(model, Replicated(), mesh=Mesh(dp=N)).lower(torch.randn(nodes, WIDTH), *ends)
    return made, gradients(model) + 4 * SHARE * nodes * WIDTH * 4


def clip() -> tuple[Program, float]:
    from transformers import CLIPConfig, CLIPModel

    side = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS)
    text = dict(**side, vocab_size=64, max_position_embeddings=16, eos_token_id=63, bos_token_id=None)
    vision = dict(**side, image_size=16, patch_size=8)
    model, rows = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)), 8
    ids = torch.randint(63, (rows, 16))
    ids[:, -1] = 63
    told = dict(input_ids=ids, pixel_values=torch.randn(rows, 3, 16, 16), attention_mask=torch.ones_like(ids))
    made = shardc.compile(model, Replicated(), mesh=Mesh(dp=N)).lower(**told, return_loss=True)
    return made, gradients(model) + 3 * SHARE * rows * 32 * 4


def fused(training: bool) -> tuple[Program, float]:
    plan = {"qkv": ColwiseParallel(), "proj": RowwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
    compiled = shardc.compile(Block(), plan, mesh=Mesh(tp=N))
    with torch.set_grad_enabled(training):
        made = compiled.lower(torch.randn(ROWS, LENGTH, WIDTH))
    return made, (3 if training else 2) * 2 * SHARE * activation()


PROGRAMS: dict[str, Callable[[], tuple[Program, float]]] = {
    "Llama, sequence split, loss in the model": llama,
    "one causal block, sequence split": block,
    "graph network, data parallel": graph,
    "CLIP, data parallel": clip,
    "fused q, k, v, first block, tensor parallel": lambda: fused(True),
    "fused q, k, v, inference, tensor parallel": lambda: fused(False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    table = Table("program", "work", "bytes", "over the least", "gap to the bound")
    rows = []
    for name, make in PROGRAMS.items():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program, least = make()
        moved = sum(c.bytes_on_wire for c in program.collectives())
        row = {"program": name, "work": program.work().repeated, "bytes": moved, "over": moved / least,
               "gap": program.optimality().gap}  # fmt: skip
        table.add_row(name, f"{row['work']:.3f}", f"{moved:,}", f"{row['over']:.3f}", f"{row['gap']:.4%}")
        rows.append(row)
    Console().print(table)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
