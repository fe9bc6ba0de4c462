"""Fine-tuning a transformers model that says itself how it is split.

pip install 'shardc[hf]'
torchrun --nproc-per-node 4 examples/hugging_face.py            # dp=2, tp=2
torchrun --nproc-per-node 4 examples/hugging_face.py --sharded  # the layers fully sharded over dp
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

import shardc
import shardc.hf

TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": None}


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels of the global batch: rows of several lengths, whose padding is not learned."""
    drawn = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 32, (4, 10), generator=drawn)
    mask = (torch.arange(10) < torch.randint(6, 11, (4, 1), generator=drawn)).long()
    return ids * mask, mask, ids.masked_fill(mask == 0, -100)


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--sharded", action="store_true")
    given = options.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    tp = 2 if world % 2 == 0 else 1
    mesh = init_device_mesh(device, (world // tp, tp), mesh_dim_names=("dp", "tp"))

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).to(device)
    data = shardc.FullyShard("model.layers.*") if given.sharded else shardc.Replicated()
    model = shardc.compile(model, shardc.hf.plan(model, data=data), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    rows = slice(mesh["dp"].get_local_rank(), None, mesh["dp"].size())  # the ranks of a tp group read the same rows
    for step in range(3):
        ids, mask, labels = (whole[rows].to(device) for whole in batch(step))
        # The mean over the tokens of all ranks, as on one device: DDP averages the means of the ranks.
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        norm = model.clip_grad_norm_(1.0)
        optimizer.step()
        if rank == 0:
            print(f"step {step + 1} loss {loss.item():.5f} gradient norm {float(norm):.5f}", flush=True)

    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
