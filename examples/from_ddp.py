"""A DistributedDataParallel script on shardc: samplers, evaluation, checkpoints, and going on from one.

    torchrun --nproc-per-node 2 examples/from_ddp.py --checkpoint build/ddp

Run it again with more --steps, and it goes on where it ended.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import shardc

GLOBAL_BATCH = 16


def data() -> TensorDataset:
    drawn = torch.Generator().manual_seed(1)
    x = torch.randn(128, 8, generator=drawn)
    return TensorDataset(x, x.sin().sum(1, keepdim=True))


def mean_over_ranks(value: torch.Tensor) -> float:
    value = value.detach().clone()
    dist.all_reduce(value)
    return value.item() / dist.get_world_size()


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--checkpoint", type=Path)
    given = options.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(device, (world,), mesh_dim_names=("dp",))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).to(device)
    model = shardc.compile(model, shardc.Replicated(), mesh=mesh)  # was: DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    # Each rank reads its own rows, as under DDP.
    sampler = DistributedSampler(data(), world, rank, shuffle=True, seed=0, drop_last=True)
    loader = DataLoader(data(), batch_size=GLOBAL_BATCH // world, sampler=sampler, drop_last=True)
    per_epoch = len(loader)

    done = 0
    folder = given.checkpoint
    if folder and folder.exists():
        shardc.load_checkpoint(folder, model, optimizer)
        done = int(next(iter(optimizer.state.values()))["step"])  # the optimizer's own count cannot fall behind it
    while done < given.steps:
        sampler.set_epoch(done // per_epoch)
        for i, (x, y) in enumerate(loader):
            if i < done % per_epoch or done >= given.steps:
                continue  # rows that were read before the checkpoint
            optimizer.zero_grad()
            loss = F.mse_loss(model(x.to(device)), y.to(device))  # of this rank's rows; gradients are averaged
            loss.backward()
            optimizer.step()
            done += 1
            shown = mean_over_ranks(loss)
            if rank == 0:
                print(f"step {done} loss {shown:.6f}", flush=True)

    if folder:
        shardc.save_checkpoint(folder, model, optimizer)
    model.eval()
    with torch.no_grad():
        wrong = [F.mse_loss(model(x.to(device)), y.to(device)) for x, y in loader]
    shown = mean_over_ranks(torch.stack(wrong).mean())
    if rank == 0:
        print(f"evaluation loss {shown:.6f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
