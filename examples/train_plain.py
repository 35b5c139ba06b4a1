"""A torchrun script as people write them: DDP, its own torch.save, no word of any launcher.

    torchrun   --nproc-per-node 2 examples/train_plain.py --steps 1000 --checkpoint /tmp/plain.pt
    perdure run --nproc-per-node 2 examples/train_plain.py --steps 1000 --checkpoint /tmp/plain.pt

Kill one of its ranks under either.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def train(steps: int, checkpoint: Path | None) -> None:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 1))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    first = 0
    if checkpoint and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
        if rank == 0:
            print(f"going on after step {first}", flush=True)

    for step in range(first + 1, steps + 1):
        draw = torch.Generator().manual_seed(step * dist.get_world_size() + rank)
        inputs = torch.randn(64, 32, generator=draw)
        loss = (wrapped(inputs) - inputs.sin().sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0 and step % 100 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
            if checkpoint:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                partial = checkpoint.with_suffix(".partial")
                torch.save({**state, "step": step}, partial)
                os.replace(partial, checkpoint)  # a kill in between leaves the older one whole


def main() -> None:
    parser = argparse.ArgumentParser(description="fit a small network to a known function")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--checkpoint", type=Path, help="saved every 100 steps, and resumed from")
    args = parser.parse_args()

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    # In a function of its own, so that the DDP wrapper is gone before the group is: were the wrapper
    # the group's last owner, gloo's thread and this one could wait for each other for ever.
    train(args.steps, args.checkpoint)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
