"""``python -m benchmarks``: what the library does on a real model, and what it costs."""

from __future__ import annotations

import platform
import sys
import time
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from tqdm import tqdm

from fastforward_optim import BracketSearch, RepeatSearch, __version__

from . import models, overhead, report
from .runner import Comparison, Method, Result, Setting, as_batch
from .tasks import MEDICAL, split_and_pack

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.callback()
def _options() -> None:
    transformers.logging.set_verbosity_error()


class Dtype(StrEnum):
    """Data types of the frozen weights, by torch's names."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def pick_device(name: str) -> torch.device:
    """The named device, or for ``auto`` a GPU if there is one."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_name() -> str:
    """What the processor calls itself, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment(device: torch.device) -> dict[str, str]:
    """What a figure has to be read with: date, hardware, versions, command."""
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "versions": f"fastforward-optim {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}",
        "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
    }


@app.command()
def demo(
    low_lr: Annotated[float, typer.Option(help="The paper's learning rate.")] = 2e-5,
    good_lr: Annotated[float, typer.Option(help="A swept one.")] = 3e-3,
    budget_steps: Annotated[
        float, typer.Option(help="Cost of each run, in plain steps.", min=1)
    ] = 26,
    interval: Annotated[int, typer.Option(help="Real steps between stages.", min=1)] = 6,
    batch_size: Annotated[int, typer.Option(help="Blocks in a step.", min=1)] = 24,
    block: Annotated[int, typer.Option(help="Tokens in a block.", min=2)] = 24,
    validation: Annotated[int, typer.Option(help="Blocks that stages measure.", min=1)] = 32,
    test: Annotated[int, typer.Option(help="Blocks to report on.", min=1)] = 64,
    rank: Annotated[int, typer.Option(help="Of the LoRA adapter.", min=1)] = 8,
    dtype: Annotated[
        Dtype, typer.Option(help="Of the frozen weights; the adapter is float32.")
    ] = Dtype.float32,
    seed: Annotated[int, typer.Option(help="Of data, adapter and batches.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    output: Annotated[Path, typer.Option(help="Folder for table, JSON and plot.")] = Path(
        "results/demo"
    ),
) -> None:
    """The main job: fine-tune SmolLM2-135M on medical text, with and without Fast Forward.

    Plain AdamW, the paper's rule (RepeatSearch) and Fast Forward's default (BracketSearch), at
    the paper's learning rate and at a good one, each for the same cost: real steps and every pass
    over the validation set are charged, the test blocks are used for nothing but the report.
    """
    where = pick_device(device)
    started = time.perf_counter()
    print("Loading SmolLM2-135M and the medical task ...", file=sys.stderr)
    model, tokenizer = models.smollm2(getattr(torch, dtype))
    splits = split_and_pack(
        MEDICAL, tokenizer, block=block, validation=validation, test=test, seed=seed
    )
    model = models.with_lora(model, rank=rank, seed=seed).to(where)
    setting = Setting(batch_size, budget_steps, interval, seed=seed)
    comparison = Comparison(model, splits, setting)
    methods = [
        Method(name, lr, search)
        for lr in (low_lr, good_lr)
        for name, search in (
            ("AdamW", None),
            ("paper's rule", RepeatSearch()),
            ("Fast Forward", BracketSearch()),
        )
    ]
    results = [
        _run_with_bar(comparison, method, number, len(methods))
        for number, method in enumerate(methods, 1)
    ]

    note = (
        f"Test loss before training: {comparison.initial_test_loss:.3f}. A trial is one pass over "
        f"the validation set and costs {comparison.costs.trial / comparison.costs.step:.2f} steps."
    )
    report.print_table(results, f"SmolLM2-135M, LoRA, medical text, equal cost, seed {seed}", note)
    about: dict[str, Any] = environment(where) | {
        "task": MEDICAL.source,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "flops_step": comparison.costs.step,
        "flops_trial": comparison.costs.trial,
    }
    report.save(output, results, about)
    print(f"{about['minutes']} minutes. Wrote {output}/loss.png, table.md and results.json.")


def _run_with_bar(comparison: Comparison, method: Method, number: int, total: int) -> Result:
    name = f"{number}/{total} {method.name}, lr {method.lr:g}"
    layout = "{desc:<42} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(total=1.0, desc=name, bar_format=layout) as bar:

        def progress(part: float, test_loss: float) -> None:
            bar.set_postfix_str(f"test loss {test_loss:.3f}", refresh=False)
            bar.update(min(part, bar.total - bar.n))

        result = comparison.run(method, progress)
        bar.update(bar.total - bar.n)
        return result


@app.command(name="overhead")
def overhead_command(
    block: Annotated[int, typer.Option(help="Tokens in a block.", min=2)] = 24,
    validation: Annotated[int, typer.Option(help="Blocks that stages measure.", min=1)] = 32,
    rank: Annotated[int, typer.Option(help="Of the LoRA adapter.", min=1)] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """What the wrapper itself costs, on SmolLM2-135M with LoRA: time and memory."""
    where = pick_device(device)
    model, tokenizer = models.smollm2()
    splits = split_and_pack(MEDICAL, tokenizer, block=block, validation=validation, test=1)
    model = models.with_lora(model, rank=rank).to(where)
    title = f"Overhead, SmolLM2-135M, LoRA rank {rank}, {validation} x {block} tokens"
    overhead.report(model, [as_batch(splits.validation, where)], Console(), title)
    for name, value in environment(where).items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    app()
