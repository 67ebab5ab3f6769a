"""``python -m benchmarks``: what the library does on a real model, and what it costs."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

from fastforward_optim import RepeatSearch

from .commands import compare as compare_commands
from .commands import paper as paper_commands
from .commands import teacher as teacher_command
from .commands.options import (
    BatchSize,
    Block,
    BudgetSteps,
    Device,
    Dtype,
    FrozenDtype,
    Interval,
    Rank,
    TaskName,
    Test,
    Tf32,
    choose,
    parse,
)
from .comparison.comparison import Comparison
from .data.tasks import MEDICAL, TASKS, split_and_pack
from .measurements import line_search as exact
from .measurements import longrun, overhead, stage_cost
from .methods.registry import adamw, calibrated, fast_forward
from .methods.trainer import Method, Setting
from .models import pretrained as models
from .reports import demo as report
from .runs import compare
from .support.environment import environment, pick_device
from .support.files import write_whole
from .support.tables import print_table, run_with_bar

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)


@app.callback()
def _options() -> None:
    transformers.logging.set_verbosity_error()


@app.command()
def demo(
    low_lr: Annotated[float, typer.Option(help="The paper's learning rate.")] = 2e-5,
    good_lr: Annotated[float, typer.Option(help="A swept one.")] = 3e-3,
    budget_steps: BudgetSteps = 48,
    interval: Interval = 6,
    batch_size: BatchSize = 8,
    block: Block = 24,
    validation: Annotated[int, typer.Option(help="Blocks that a trial measures.", min=1)] = 8,
    test: Test = 64,
    rank: Rank = 8,
    dtype: FrozenDtype = Dtype.float32,
    seed: Annotated[int, typer.Option(help="Of data, adapter and batches.")] = 0,
    device: Device = "auto",
    output: Annotated[Path, typer.Option(help="Folder for table, JSON and plot.")] = Path(
        "results/demo"
    ),
) -> None:
    """The main job: fine-tune SmolLM2-135M on medical text, with and without Fast Forward.

    Plain AdamW, the paper's rule (RepeatSearch), Fast Forward's default (BracketSearch) and
    calibrate_lr, at the paper's learning rate and at a good one, under a linear decay, each for the
    same cost: real steps and every pass over the validation set are charged, the test blocks are
    used for nothing but the report.
    """
    where = pick_device(device)
    started = time.perf_counter()
    print("Loading SmolLM2-135M and the medical task ...", file=sys.stderr)
    model, tokenizer = models.smollm2(getattr(torch, dtype))
    splits = split_and_pack(
        MEDICAL, tokenizer, block=block, validation=8 * validation, test=test, seed=seed
    )
    model = models.with_lora(model, rank=rank, seed=seed).to(where)
    setting = Setting(batch_size, budget_steps, interval, validation)
    comparison = Comparison(model, splits, setting, seed)
    # AdamW does not train on the validation blocks: all see the same batches.
    methods = (
        Method("AdamW", "", adamw),
        Method("paper's rule", "", fast_forward(fixed_interval=True, line_search=RepeatSearch())),
        Method("Fast Forward", "", fast_forward()),
        Method("calibrated", "", calibrated),
    )
    jobs = [(method, lr) for lr in (low_lr, good_lr) for method in methods]
    results = [
        run_with_bar(
            *(comparison, method, lr, f"{number}/{len(jobs)} {method.name}, lr {lr:g}"), "linear"
        )
        for number, (method, lr) in enumerate(jobs, 1)
    ]

    note = (
        f"Test loss before training: {comparison.initial_test_loss:.3f}. A trial is one pass over "
        f"the validation set and costs {comparison.costs.trial / comparison.costs.step:.2f} steps."
    )
    title = f"SmolLM2-135M, LoRA, medical text, linear decay, equal cost, seed {seed}"
    print_table(report.COLUMNS, report.rows(results), title, note)
    about: dict[str, Any] = environment(where) | {
        "task": MEDICAL.source,
        "minutes": round((time.perf_counter() - started) / 60, 1),
        "flops_step": comparison.costs.step,
        "flops_trial": comparison.costs.trial,
    }
    report.save(output, results, about)
    print(f"{about['minutes']} minutes. Wrote {output}/loss.png, table.md and results.json.")


app.command(name="compare", epilog=f"The methods:\n\n{compare_commands.METHODS_HELP}")(
    compare_commands.compare_command
)
app.command(name="tokens")(compare_commands.tokens_command)
app.command(name="teacher")(teacher_command.teacher_command)
app.command(
    name="paper", epilog=f"The presets, where they differ:\n\n{paper_commands.PRESETS_HELP}"
)(paper_commands.paper_command)
app.command(name="report")(paper_commands.report_command)
app.command(name="shapes")(paper_commands.shapes_command)
app.command(name="ranks")(paper_commands.ranks_command)


@app.command(name="line-search")
def line_search_command(
    task: TaskName = MEDICAL.name,
    searches: Annotated[
        str, typer.Option(help="Of repeat (hundreds of trials at low rates) and bracket.")
    ] = "bracket",
    lrs: Annotated[str, typer.Option(help="Learning rates.")] = "2e-5,1e-4,3e-3",
    steps: Annotated[int, typer.Option(help="Real steps of a run.", min=1)] = 60,
    batch_size: BatchSize = 64,
    rank: Rank = 64,
    block: Block = 128,
    device: Device = "auto",
    tf32: Tf32 = False,
) -> None:
    """How much of the decrease on the line each search finds, and for how many trials.

    At each stage an exact line search looks at the same line and the same examples.
    """
    text = choose("--task", TASKS, task)
    names = searches.split(",")
    for name in names:
        choose("--searches", exact.SEARCHES, name)
    rates = parse("--lrs", compare.parse_rates, lrs)
    where = pick_device(device)
    if tf32:
        torch.set_float32_matmul_precision("high")
    base, tokenizer = models.smollm2()
    splits = split_and_pack(text, tokenizer, block=block, test=1)
    adapted = models.with_lora(base, rank=rank).to(where)
    comparison = Comparison(adapted, splits, Setting(batch_size, steps))
    rows = []
    for name in names:
        for lr in rates:
            stages, trials, share = exact.summary(exact.measure(comparison, name, lr, steps))
            rows.append((name, f"{lr:g}", str(stages), f"{trials:.1f}", f"{100 * share:.1f} %"))
            print(*rows[-1], file=sys.stderr)
    columns = ("search", "lr", "stages", "trials a stage", "of the exact decrease")
    print_table(columns, rows, f"Line searches, {task}, {steps} steps", str(environment(where)))


@app.command(name="overhead")
def overhead_command(
    block: Block = 24,
    validation: Annotated[int, typer.Option(help="Blocks that stages measure.", min=1)] = 32,
    rank: Rank = 8,
    device: Device = "auto",
    shapes: Annotated[
        str, typer.Option(help="On a GPU: adapters of models of these shapes too.")
    ] = "smollm2-135m,pythia-1.4b,llama-3-8b",
    output: Annotated[Path, typer.Option(help="On a GPU: folder of the JSON.")] = Path(
        "results/overhead"
    ),
) -> None:
    """What the wrapper itself costs, on SmolLM2-135M with LoRA: time and memory.

    On a GPU also what a candidate, a trial and a stage cost against the speed of its memory, and
    what forwards cost as CUDA graphs.
    """
    where = pick_device(device)
    names = [name.strip() for name in shapes.split(",")]
    for name in names:
        choose("--shapes", models.SHAPES, name)
    model, tokenizer = models.smollm2()
    splits = split_and_pack(MEDICAL, tokenizer, block=block, validation=validation, test=1)
    model = models.with_lora(model, rank=rank).to(where)
    title = f"Overhead, SmolLM2-135M, LoRA rank {rank}, {validation} x {block} tokens"
    overhead.report(model, [splits.validation.batch(where)], Console(), title)
    for name, value in environment(where).items():
        print(f"{name}: {value}")
    if where.type == "cuda":
        trials = {name: (16, 512) if name == "llama-3-8b" else (32, 128) for name in names}
        stage_cost.report(names, where, output, trials)


@app.command(name="longrun")
def longrun_command(
    steps: Annotated[int, typer.Option(help="Real steps of each run.", min=100)] = 10000,
    interval: Interval = 6,
    device: Device = "auto",
    output: Annotated[Path, typer.Option(help="Folder of the JSON.")] = Path("results/longrun"),
) -> None:
    """Whether memory grows, weights drift or stages get slower in a long run of a small model.

    It fails if tensors grow, if stages that roll back leave a trace, or if a committed candidate
    is off by more than rounding. Times and the process's memory are reported only.
    """
    where = pick_device(device)
    rows, held = longrun.report(where, steps, interval)
    about = environment(where)
    write_whole(output / f"{where.type}-{steps}.json", {"about": about, "rows": rows})
    if not held:
        print("A promise was broken: see the table.", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
