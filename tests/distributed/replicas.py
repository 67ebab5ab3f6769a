"""A check, run on each rank, that needs four of them: shards that are replicated."""

import torch
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed.launch import DEVICE
from tests.distributed.training import EXCEPTIONS, alone, assert_close, sharded, train

__all__ = ["EXCEPTIONS"]


def check_fsdp_with_replicas_of_the_shards(rank, size):
    if DEVICE == "cpu" and torch.__version__.startswith("2.7"):
        return  # its backward fails there, with any optimizer
    mesh = init_device_mesh(DEVICE, (size // 2, 2), mesh_dim_names=("replicate", "shard"))
    model = sharded(mesh=mesh)
    several = train(model, model, rank=rank, size=size, steps=20)
    assert_close(alone(steps=20), several)
