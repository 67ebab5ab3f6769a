"""``ranks``: what a stage costs on several ranks, launched by torchrun.

    torchrun --nproc-per-node 2 -m benchmarks ranks --model llama-3-8b --way ddp

It counts the calls and bytes of Fast Forward's own collectives, and times a step, a trial whose
batches are split over the ranks, and an exchange of the ranks without a forward.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import AdamW

from fastforward_optim import FastForward, ValidationLoss, lora_parameters
from fastforward_optim.ranks import Ranks

from ..models.adapters import with_lora
from ..models.shapes import random_model
from ..support.environment import environment, pick_device
from ..support.files import write_json
from ..support.timing import WARM_UP, elapsed, median_of
from .fixed_stages import TRIALS, fixed_search, random_blocks
from .rows import MeasuredRow, print_rows

REPEATS, EXCHANGES = 10, 200


def report(
    name: str,
    way: str,
    *,
    device: str,
    rank: int,
    batch_size: int,
    block: int,
    validation: int,
    trial_size: int,
    dtype: torch.dtype,
    output: Path,
) -> None:
    """Measure on all launched ranks; the first rank prints and writes the results.

    Args:
        name: one of ``SHAPES``.
        way: ``ddp``, or ``fsdp`` (``fully_shard``).
        device: ``cpu``, ``cuda`` or ``auto``.
        rank: of the adapter.
        batch_size: blocks per rank and step.
        block: tokens in a block.
        validation: blocks that a trial measures, over all ranks.
        trial_size: blocks in a batch of a trial.
        dtype: of the weights, including the adapter.
        output: the folder for the JSON.
    """
    where = pick_device(device)
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(where)
        dist.init_process_group("nccl", device_id=where)
    else:
        dist.init_process_group("gloo")
    place, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = with_lora(random_model(name, dtype, where), rank=rank).to(dtype)
    net = _parallel(model, way)
    blocks = random_blocks(model.config.vocab_size, size * batch_size + validation, block)
    mine = slice(place * batch_size, (place + 1) * batch_size)
    batch = blocks.select(mine).batch(where)
    parts = blocks.select(slice(size * batch_size, None)).split(trial_size)
    val_fn = ValidationLoss(net, [part.batch(where) for part in parts])
    rows = measure(model, net, batch, val_fn, where)
    if place == 0:
        about = environment(where) | {"ranks": f"{size}, {way}", "model": name}
        title = (
            f"{name}, random weights, LoRA rank {rank}, {way} on {size} ranks, {batch_size} x "
            f"{block} tokens a rank and step, {validation} x {block} a trial in batches of "
            f"{trial_size}"
        )
        print_rows(rows, title, about)
        write_json(output / f"{name}-{way}-{size}.json", {"about": about, "rows": rows})
    dist.destroy_process_group()


def measure(
    model: Any, net: nn.Module, batch: dict[str, Any], val_fn: ValidationLoss, device: torch.device
) -> list[MeasuredRow]:
    """Measure times in ms (medians, on the slowest rank), calls and bytes."""
    params = lora_parameters(model)
    adamw = AdamW(params, lr=1e-9)
    spent = [0.0]

    class Timed:
        """``val_fn``, with its forwards timed."""

        plan, share = val_fn.plan, val_fn.share

        def weighted(self) -> tuple[float, float]:
            results = []
            spent[0] += elapsed(lambda: results.append(val_fn.weighted()), device)
            return results[0]

        __call__ = weighted

    optimizer = FastForward(adamw, Timed(), interval=1, line_search=fixed_search)

    def backward() -> None:
        net(**batch).loss.backward()

    def step() -> None:
        backward()
        adamw.step()
        adamw.zero_grad()

    step_time, _ = median_of(lambda: elapsed(step, device), device, REPEATS)
    backward()
    stages, trials = [], []
    for repeat in range(WARM_UP + REPEATS):
        spent[0] = 0.0
        plain = elapsed(adamw.step, device)
        whole = elapsed(optimizer.step, device)
        if repeat >= WARM_UP:
            stages.append(1e3 * (whole - plain - spent[0]))
            trials.append(1e3 * spent[0] / TRIALS)
    with _counted() as calls:
        optimizer.step()
    exchanges = [1e3 * elapsed(_exchange, device) for _ in range(EXCHANGES)]
    adapter = sum(p.numel() * p.element_size() for p in params)
    return [
        {"what": "training step", "value": _slowest(1e3 * step_time), "unit": "ms"},
        {"what": "trial", "value": _slowest(statistics.median(trials)), "unit": "ms"},
        {
            "what": f"stage of {TRIALS} trials, beyond its forwards",
            "value": _slowest(statistics.median(stages)),
            "unit": "ms",
        },
        {
            "what": "an exchange alone",
            "value": _slowest(statistics.median(exchanges)),
            "unit": "ms",
        },
        {"what": f"exchanges in a stage of {TRIALS} trials", "value": len(calls), "unit": ""},
        {"what": "sent by a rank in an exchange", "value": max(calls, default=0), "unit": "bytes"},
        {"what": "adapter, on all ranks", "value": adapter / 1e6, "unit": "MB"},
    ]


def _exchange() -> None:
    Ranks(None, 0).mean(lambda: 0.0)


@contextmanager
def _counted() -> Iterator[list[int]]:
    """Record the bytes that this rank sends in each of Fast Forward's collectives."""
    calls: list[int] = []
    real = dist.all_gather

    def all_gather(gathered: Any, values: torch.Tensor, group: Any = None) -> Any:
        calls.append(values.numel() * values.element_size())
        return real(gathered, values, group=group)

    with mock.patch("fastforward_optim.ranks.dist.all_gather", all_gather):
        yield calls


def _parallel(model: Any, way: str) -> nn.Module:
    if way == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    layers = max(
        (module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len
    )
    for layer in layers:
        fully_shard(layer)
    sharded: nn.Module = fully_shard(model)
    return sharded


def _slowest(value: float) -> float:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, value)
    return float(max(every))
