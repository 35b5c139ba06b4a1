"""A small GPT that learns the source of Python's standard library, and can be killed at any moment.

Copy this file to start a job of your own: everything perdure needs of a script is in `train`, eight
lines marked with `# perdure`. It runs the same under `perdure run`, `torchrun` and plain `python`.

A resumed run follows the unbroken run bit by bit (on CPU; one thread, so that sums have one order):
- the data order is a function of the seed and of one global cursor, never of the number of ranks;
- the state holds the model, the optimizer, the cursor and each rank's random state (for dropout);
- gradients are added in the same order in every attempt (see `settle_buckets`).
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import perdure


class Block(nn.Module):
    """Attention and a two-layer perceptron, each after a norm, each added to its input."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(*qkv.unbind(0), dropout_p=p, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, time, width))
        return x + F.dropout(self.down(F.gelu(self.up(self.norm_2(x)))), p)


class GPT(nn.Module):
    """Bytes in, the loss of predicting each next byte out."""

    def __init__(self, layers: int, width: int, heads: int, context: int, dropout: float) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


class Corpus:
    """Windows of `context` bytes, in a shuffled order that only the seed and the cursor decide."""

    def __init__(self, seed: int, context: int, limit_bytes: int) -> None:
        text = bytearray()
        for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
            text += file.read_bytes()
            if len(text) >= limit_bytes:
                break
        self.text, self.context, self.seed = (
            torch.frombuffer(text, dtype=torch.uint8),
            context,
            seed,
        )
        self.windows = (len(text) - 1) // context
        self.checksum = zlib.crc32(text)  # another Python has another library: see train
        self._epoch, self._order = -1, torch.empty(0)

    def samples(self, cursor: int, count: int) -> list[int]:
        """The windows at `cursor` and after it; each window once an epoch."""
        chosen = []
        for at in range(cursor, cursor + count):
            epoch, place = divmod(at, self.windows)
            if epoch != self._epoch:
                shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self._epoch, self._order = epoch, torch.randperm(self.windows, generator=shuffle)
            chosen.append(int(self._order[place]))
        return chosen

    def batch(self, samples: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """(samples, context) bytes and the bytes that follow each."""
        starts = torch.tensor(samples)[:, None] * self.context + torch.arange(self.context + 1)
        tokens = self.text[starts].long().to(device)
        return tokens[:, :-1], tokens[:, 1:]


def join_the_gang(local_rank: int) -> torch.device:
    """The process group, from torchrun's variables where they are; else a gang of one."""
    device = torch.device("cpu")
    if torch.accelerator.is_available():  # CUDA, Ascend NPU (with torch_npu installed), ...
        torch.accelerator.set_device_index(local_rank)
        device = torch.device(torch.accelerator.current_accelerator() or "cpu", local_rank)
    else:
        torch.set_num_threads(1)
    backend = dist.get_default_backend_for_device(device)
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def shard_or_replicate(model: GPT, fsdp: bool) -> nn.Module:
    """FSDP2 shards the model in place; DDP wraps it, and the checkpoint takes what is inside."""
    if not fsdp:
        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def settle_buckets(wrapped: nn.Module, tokens: Tensor, targets: Tensor) -> None:
    """One backward pass whose gradients are thrown away.

    After its first backward pass DDP lays its gradient buckets out anew, and the order in which
    gloo adds up an element depends on its place. Without this, the first step after a restart would
    add in another order than the same step of a run that was never killed.
    """
    for _ in range(2):  # the new layout is taken up at the beginning of the second pass
        wrapped(tokens, targets).backward()
    wrapped.zero_grad(set_to_none=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="train a small GPT on the standard library")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps in all")
    parser.add_argument("--batch", type=int, default=16, help="samples a step, over all ranks")
    parser.add_argument("--save-every", type=int, default=None, help="steps (default: perdure's)")
    parser.add_argument("--seed", type=int, default=0)
    # not `--log`: torchrun takes that for an abbreviation of its own --log-dir
    parser.add_argument(
        "--losses", type=Path, help="rank 0 appends a JSON line a step to this file"
    )
    parser.add_argument("--store", help="URL for checkpoints, where no launcher names one")
    parser.add_argument("--fsdp", action="store_true", help="shard with FSDP2 instead of DDP")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=64, help="bytes a sample")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--corpus-mb", type=int, default=4, help="how much of the library to read")
    return parser.parse_args()


def train(args: argparse.Namespace) -> None:
    run = perdure.init(save_every=args.save_every, total_steps=args.steps)  # perdure
    device = join_the_gang(run.local_rank)
    share, uneven = divmod(args.batch, run.world_size)
    if uneven:
        raise SystemExit(f"--batch {args.batch} cannot be shared evenly by {run.world_size} ranks")
    corpus = Corpus(args.seed, args.context, args.corpus_mb << 20)

    torch.manual_seed(args.seed)  # the same weights on every rank
    model = GPT(args.layers, args.width, args.heads, args.context, args.dropout).to(device)
    wrapped = shard_or_replicate(model, args.fsdp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    if not args.fsdp:
        settle_buckets(wrapped, *corpus.batch([0] * share, device))
    torch.manual_seed(args.seed + 1 + run.rank)  # other dropout on every rank

    progress = {"step": 0, "cursor": 0, "corpus": corpus.checksum}
    rng = {f"rank{run.rank}": torch.get_rng_state()}  # `rank<N>`: this entry is that rank's own
    state = {"model": model, "optimizer": optimizer, "progress": progress, "rng": rng}
    checkpointer = (  # perdure
        perdure.Checkpointer(args.store) if args.store else run.checkpointer()
    )
    restored = checkpointer.restore(state)  # perdure: in place; None when there is nothing yet
    if restored:
        torch.set_rng_state(rng[f"rank{run.rank}"])
        if progress["corpus"] != corpus.checksum:
            raise SystemExit("this Python's standard library is not the one the run began with")

    said = "nothing was left to do"
    while progress["step"] < args.steps:
        samples = corpus.samples(progress["cursor"], args.batch)
        mine = samples[run.rank * share : (run.rank + 1) * share]
        loss = wrapped(*corpus.batch(mine, device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        progress["step"] += 1
        progress["cursor"] += args.batch
        step = progress["step"]

        mean = loss.detach().clone()
        dist.all_reduce(mean)
        value = mean.item() / run.world_size
        said = f"loss {value:.4f}"
        run.beat(step, loss=value)  # perdure: optional; tells the loss
        if args.losses and run.rank == 0:
            line = {"step": step, "loss": value.hex(), "samples": samples, "attempt": run.attempt}
            with args.losses.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if run.due(step) or step == args.steps:  # perdure: true on every rank at the same step
            rng[f"rank{run.rank}"].copy_(torch.get_rng_state())
            handle = checkpointer.save(step, state)  # perdure: returns once the bytes are copied
            if step == args.steps:
                handle.wait()  # perdure: the last one is worth waiting for
    if run.rank == 0:
        print(f"done: step {progress['step']}, {said}", flush=True)
    checkpointer.close()  # perdure


def main() -> None:
    # In a function of its own, so that the DDP wrapper is gone before the group is: were the wrapper
    # the group's last owner, gloo's thread and this one could wait for each other for ever.
    train(parse())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
