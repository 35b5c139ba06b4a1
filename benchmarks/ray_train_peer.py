"""The plain script's model under Ray Train, two workers on two nodes: the peer of node_loss.py.

    ray_train_peer.py ADDRESS STAMPS

Ray Train takes a function, not a script, so the loop of examples/train_plain.py stands here again.
"""

from __future__ import annotations

import os
import sys


def loop(config: dict[str, str]) -> None:
    """What each worker runs; Ray Train has set up the process group."""
    import ray.train
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from perdure.benchmarks.observed import stamp_each_step

    os.environ["RANK"] = str(ray.train.get_context().get_world_rank())
    stamp_each_step(config["stamps"])
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 1))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(1_000_000):
        inputs = torch.randn(64, 32)
        loss = (wrapped(inputs) - inputs.sin().sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main(address: str, stamps: str) -> None:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address=address)
    TorchTrainer(
        loop,
        train_loop_config={"stamps": stamps},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(
            num_workers=2, resources_per_worker={"CPU": 1}, placement_strategy="STRICT_SPREAD"
        ),
        run_config=RunConfig(
            storage_path=os.path.dirname(stamps), failure_config=FailureConfig(max_failures=3)
        ),
    ).fit()


if __name__ == "__main__":
    main(*sys.argv[1:])
