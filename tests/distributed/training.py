"""Checks, run on each rank: torch's ways of training on several end where one process does."""

from contextlib import nullcontext
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from fastforward_optim import FastForward, ValidationLoss, lora_parameters
from tests.conftest import LOWEST, fixed, same
from tests.conftest import tiny_lora as single_lora
from tests.distributed.launch import DEVICE

# transformers, peft and torch's own parts use what others of them have deprecated.
EXCEPTIONS = [
    "the probe of a calibration",  # one set will do here
    "`is_gradient_checkpointing` is deprecated",
    "`torch.distributed.* is deprecated",
]

STEPS = 30
VALIDATION = [(4, 9, 1), (2, 5, 2), (3, 7, 4)]


def tiny_lora():
    """In float64: rounding, of which Adam makes much, is not what tells one run from another."""
    return single_lora().double().to(DEVICE)


def count_up(rows, length, seed):
    """Rows that count up by 1, 2 or 3 from somewhere: something to learn."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 97, (rows, 1), generator=generator)
    stride = torch.randint(1, 4, (rows, 1), generator=generator)
    tokens = (start + stride * torch.arange(length)) % 97
    tokens = tokens.to(DEVICE)
    return {"input_ids": tokens, "labels": tokens.clone()}


def whole(tensor):
    """A copy of all of a tensor, also of a sharded one."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone().to(DEVICE)


def train(
    model, net, *, rank=0, size=1, group=None, steps=STEPS, accumulate=1, clip=None, spike=None,
    **options,
):  # fmt: skip
    """Train an adapter through ``net``; gives the optimizer and the weights.

    The gradient of step ``spike`` is a thousand times itself.
    """
    val_fn = ValidationLoss(
        net, [count_up(*batch) for batch in VALIDATION],
        process_group=options.pop("split", None),
    )  # fmt: skip
    params = lora_parameters(model)
    inner = torch.optim.AdamW(params, lr=options.pop("lr", 1e-3))
    if not options.get("calibrate_lr"):
        options = {"line_search": LOWEST, **options}
    optimizer = FastForward(inner, val_fn, process_group=group, **fixed(5) | options)
    for step in range(steps):
        for part in range(accumulate):
            batch = count_up(8, 9, 100 + step * accumulate + part)
            mine = {name: rows[rank::size] for name, rows in batch.items()}
            last = part == accumulate - 1
            waits = net.no_sync() if hasattr(net, "no_sync") and not last else nullcontext()
            with waits:
                (net(**mine).loss / accumulate).backward()
        if step == spike:
            for p in params:
                p.grad.mul_(1000)
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finish()
    return optimizer, [whole(p) for p in params]


@cache
def alone(**options):
    """The same run in one process; several checks compare with it."""
    model = tiny_lora()
    return train(model, model, group=False, **options)


def assert_close(one, several, within=1e-6):
    """The same stages, and weights that have moved in the same way but for rounding."""
    (first, expected), (second, found) = one, several
    assert [record.step for record in second.history] == [record.step for record in first.history]
    assert any(record.tau for record in first.history)
    for a, b in zip(first.history, second.history, strict=True):
        assert a.tau == pytest.approx(b.tau, rel=within)
        assert a.loss_after == pytest.approx(b.loss_after, rel=1e-3 * within)
    start = [p.detach() for p in lora_parameters(tiny_lora())]
    moved = sum((a - s).square().sum() for a, s in zip(expected, start, strict=True)).sqrt()
    apart = sum((a - b).square().sum() for a, b in zip(expected, found, strict=True)).sqrt()
    assert apart < within * moved, f"{apart} apart, {moved} moved"


def assert_same_on_all_ranks(tensors):
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, tensors)
    assert all(same(other, gathered[0]) for other in gathered)


def sharded(*, layers=True, dtype=torch.float64, **options):
    model = tiny_lora().to(dtype)
    if layers:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def check_ddp(rank, size):
    model = tiny_lora()
    several = train(model, DistributedDataParallel(model), rank=rank, size=size)
    assert_close(alone(), several)
    assert_same_on_all_ranks(several[1])


def check_ddp_calibrated(rank, size):
    model = tiny_lora()
    options = {"calibrate_lr": True, "max_interval": 10, "lr": 1e-4, "spike": 30}
    several = train(model, DistributedDataParallel(model), rank=rank, size=size, **options)
    assert_close(alone(**options), several)
    assert_same_on_all_ranks(several[1])


def check_ddp_accumulates_without_synchronising_and_clips(rank, size):
    model = tiny_lora()
    options = {"accumulate": 2, "clip": 0.05, "steps": 20}
    several = train(model, DistributedDataParallel(model), rank=rank, size=size, **options)
    assert_close(alone(**options), several)


def check_fsdp(rank, size):
    model = sharded()
    several = train(model, model, rank=rank, size=size)
    assert isinstance(lora_parameters(model)[0], DTensor)
    assert_close(alone(), several)


def check_fsdp_calibrated(rank, size):
    model = sharded()
    options = {"calibrate_lr": True, "max_interval": 10, "lr": 1e-4, "spike": 30}
    several = train(model, model, rank=rank, size=size, **options)
    assert_close(alone(**options), several)


def check_fsdp_of_the_root_alone_measures_each_candidate(rank, size):
    """Its parameters stay gathered after a forward without gradients."""
    model = sharded(layers=False)
    several = train(model, model, rank=rank, size=size, steps=20)
    assert all(len({loss for _, loss in r.trials}) > 1 for r in several[0].history)
    assert_close(alone(steps=20), several)


def check_fsdp_that_does_not_reshard_measures_each_candidate(rank, size):
    model = sharded(reshard_after_forward=False)
    several = train(model, model, rank=rank, size=size, steps=20)
    assert_close(alone(steps=20), several)


def check_fsdp_in_mixed_precision(rank, size):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(mp_policy=policy, dtype=torch.float32)
    optimizer, weights = train(model, model, rank=rank, size=size, steps=20, lr=1e-2)
    assert all(p.dtype == torch.float32 for p in weights)
    assert len(optimizer.history) == 4
    assert any(record.tau for record in optimizer.history)
    assert all(record.loss_after <= record.loss_before for record in optimizer.history)
    assert_same_on_all_ranks(weights)


def check_fsdp_accumulates_and_clips(rank, size):
    model = sharded()
    options = {"accumulate": 2, "clip": 0.05, "steps": 20}
    several = train(model, model, rank=rank, size=size, **options)
    assert_close(alone(**options), several, within=1e-4)  # torch 2.7 rounds the norm of shards


def check_fsdp_offloaded_to_the_cpu(rank, size):
    if "cpu" not in dist.get_backend_config():
        return  # what is on the CPU cannot be gathered
    model = sharded(offload_policy=CPUOffloadPolicy(pin_memory=DEVICE == "cuda"))
    several = train(model, model, rank=rank, size=size, steps=20)
    assert_close(alone(steps=20), several)


def check_fsdp_is_refused_where_its_modules_cannot_be_recognised(rank, size):
    model = sharded()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("torch.distributed.fsdp.FSDPModule")
        with pytest.raises(ImportError, match="each trial would measure the same weights"):
            FastForward(torch.optim.SGD(lora_parameters(model), lr=0.1), lambda: 0.0)


def check_fsdp_keeps_copies_of_the_shards_only(rank, size):
    """No tensor is gathered: what is copied is what this rank holds."""
    from fastforward_optim.stage.stage import Stage, copies

    model = sharded()
    params = lora_parameters(model)
    stage = Stage(params)
    copied = sum(copy.numel() for group in copies(stage._groups) for copy in group)
    assert copied == sum(p.to_local().numel() for p in params)
    assert copied < sum(p.numel() for p in params)


class LowRank(nn.Module):
    """Two layers with adapters, as tensor parallelism splits them: by columns, then by rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 2)
        self.first_a, self.first_b = nn.Linear(8, 4, bias=False), nn.Linear(4, 16, bias=False)
        self.second_a, self.second_b = nn.Linear(16, 4, bias=False), nn.Linear(4, 2, bias=False)
        torch.set_default_dtype(torch.float32)
        self.freeze()

    def freeze(self):
        self.first.requires_grad_(False)
        self.second.requires_grad_(False)
        return self

    def forward(self, inputs):
        hidden = torch.tanh(self.first(inputs) + self.first_b(self.first_a(inputs)))
        return self.second(hidden) + self.second_b(self.second_a(hidden))

    def adapter(self):
        return [p for p in self.parameters() if p.requires_grad]


PLAN = {
    "first": ColwiseParallel(),
    "first_b": ColwiseParallel(),
    "second": RowwiseParallel(),
    "second_a": RowwiseParallel(),
}


def low_rank_run(model, **options):
    def measure(model, batch):
        inputs, targets = batch
        return nn.functional.mse_loss(model(inputs), targets), len(inputs)

    torch.manual_seed(1)
    inputs = [torch.randn(6, 8, dtype=torch.float64).to(DEVICE) for _ in range(5)]
    data = [(values, torch.stack([values.sum(1), values[:, 0]], dim=1)) for values in inputs]
    val_fn = ValidationLoss(model, data[3:], forward=measure, process_group=False)
    inner = torch.optim.AdamW(model.adapter(), lr=1e-3, foreach=False)
    if not options.get("calibrate_lr"):
        options["line_search"] = LOWEST
    optimizer = FastForward(inner, val_fn, **fixed(4) | options)
    for number in range(20):
        inputs, targets = data[number % 3]
        nn.functional.mse_loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.finish()
    return optimizer, [whole(p) for p in model.adapter()]


def check_tensor_parallel_adapters(rank, size):
    mesh = init_device_mesh(DEVICE, (size,), mesh_dim_names=("tp",))
    for options in ({}, {"calibrate_lr": True}):
        model = parallelize_module(LowRank().to(DEVICE), mesh, PLAN).freeze()  # torch 2.7 thaws
        assert {type(p.data) for p in model.adapter()} == {DTensor, torch.Tensor}
        found = low_rank_run(model, **options)
        expected = low_rank_run(LowRank().to(DEVICE), process_group=False, **options)
        taus = [r.tau for r in expected[0].history]
        assert [r.tau for r in found[0].history] == pytest.approx(taus, rel=1e-6)
        assert any(r.tau for r in found[0].history)
        for a, b in zip(found[1], expected[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
