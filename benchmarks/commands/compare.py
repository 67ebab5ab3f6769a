"""The commands around the grid at equal cost: ``compare`` and ``tokens``."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from ..data.tasks import MEDICAL
from ..methods.registry import METHODS
from ..methods.schedules import SCHEDULES, WARMUP
from ..models.pretrained import MODELS
from ..reports import compare as compare_report
from ..reports import compare_summary
from ..runs import compare
from ..runs.compare import Plan
from ..runs.workers import INTERRUPTED, Work, run_alone, run_shared
from ..support.environment import pick_device
from .options import (
    POOL,
    BatchSize,
    Block,
    Device,
    Dtype,
    FrozenDtype,
    Interval,
    Model,
    Rank,
    Tasks,
    Test,
    Tf32,
    TrainBlocks,
    check_pool,
    choose,
    parse,
    parse_methods,
    parse_rates,
    parse_schedules,
    parse_seeds,
    parse_steps,
    parse_tasks,
)

METHODS_HELP = "\n\n".join(
    f"{method.name} ({', '.join(method.schedules)}): {method.about}" for method in METHODS.values()
)

Pool = Annotated[
    int | None,
    typer.Option(
        help="Blocks that trials are taken from, a multiple of --validation.",
        show_default=f"{POOL} or a little less",
        min=1,
    ),
]
Validation = Annotated[
    int | None,
    typer.Option(
        help="Blocks that a trial measures.",
        show_default="1,000 tokens, but no more than a step has, 8 to 32",
        min=1,
    ),
]


def compare_command(
    task: Tasks = MEDICAL.name,
    model: Model = "smollm2",
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated; they are listed below. With schedules and learning rates of "
            "its own: loraplus/linear+cosine@1e-4+3e-4."
        ),
    ] = "adamw,bracket,calibrated",
    schedule: Annotated[
        str,
        typer.Option(
            help=f"Of the learning rate, comma-separated, of {', '.join(SCHEDULES)}; a decay comes "
            f"after a warm-up over {WARMUP:.0%} of the run. A method that can have none of them "
            "has its own."
        ),
    ] = "linear",
    lrs: Annotated[
        str, typer.Option(help="Learning rates. Methods that ignore it run once a seed.")
    ] = "1e-5,1e-4,1e-3,3e-3,1e-2",
    seeds: Annotated[str, typer.Option(help="Of adapter and batches.")] = "0,1,2",
    steps: Annotated[
        str, typer.Option(help="Lengths: cost of each run in plain steps, comma-separated.")
    ] = "120",
    batch_size: BatchSize = 64,
    rank: Rank = 64,
    block: Block = 128,
    interval: Interval = 6,
    validation: Validation = None,
    pool: Pool = None,
    test: Test = 512,
    train_blocks: TrainBlocks = 8000,
    tokens: Annotated[
        Path | None,
        typer.Option(help="Folder that `tokens` has written, in place of the tasks' texts."),
    ] = None,
    dtype: FrozenDtype = Dtype.float32,
    device: Device = "auto",
    compile_layers: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the decoder's layers.")
    ] = False,
    graphs: Annotated[
        bool,
        typer.Option(
            help="On a GPU: steps, trials and test evaluations replay CUDA graphs.",
        ),
    ] = False,
    tf32: Tf32 = False,
    evaluations: Annotated[
        int, typer.Option(help="How often the test loss is taken in a run.", min=1)
    ] = 4,
    test_stages: Annotated[
        bool, typer.Option(help="Take it before and after each stage too (not charged).")
    ] = False,
    workers: Annotated[
        int, typer.Option(help="Processes that share the runs, and the GPUs in turn.", min=1)
    ] = 1,
    minutes: Annotated[
        float | None, typer.Option(help="Start no run that would end later.", min=0)
    ] = None,
    run: Annotated[bool, typer.Option(help="Or only report on the runs that are there.")] = True,
    output: Annotated[Path, typer.Option(help="Folder of the folders.")] = Path("results/compare"),
) -> None:
    """Methods, schedules, rates, seeds, lengths and tasks at equal cost, a file for each run.

    The same command goes on where it was interrupted. Tables and plots are of all the runs in the
    folders of the settings, those of earlier commands included.
    """
    end = math.inf if minutes is None else time.time() + 60 * minutes
    choose("--model", MODELS, model)
    tasks = parse("--task", parse_tasks, task)
    lengths = parse("--steps", parse_steps, steps)
    validation = validation or compare.default_validation(batch_size, block)
    pool = pool or max(1, POOL // validation) * validation
    check_pool(pool, validation)
    if run and graphs and pick_device(device).type != "cuda":
        raise typer.BadParameter("needs a GPU", param_hint="--graphs")
    base = Plan(
        **{"task": tasks[0], "model": model, "rank": rank, "batch_size": batch_size},
        **{"block": block, "budget_steps": lengths[0], "interval": interval},
        **{"validation": validation, "pool": pool, "test": test, "train_blocks": train_blocks},
        **{"dtype": dtype.value, "evaluations": evaluations},
        **{"test_stages": test_stages, "compile": compile_layers, "graphs": graphs, "tf32": tf32},
    )
    plans = compare.plans(base, tasks, lengths)
    jobs = compare.grid(
        plans,
        parse("--methods", parse_methods, methods),
        parse("--schedule", parse_schedules, schedule),
        parse("--lrs", parse_rates, lrs),
        parse("--seeds", parse_seeds, seeds),
    )
    work = Work(jobs, output, device, end, tokens)
    if run:
        _fill(work, workers)
    _report(plans, output)
    if run and (left := len(work.left())):
        print(f"Out of time: {left} of {len(jobs)} runs are left. The same command goes on.")


def _fill(work: Work, workers: int) -> None:
    """Run what is not there yet.

    Raises:
        SystemExit: it was interrupted (code 130), or a folder is not as it has to be.
    """
    left = work.left()
    if not left:
        return
    try:
        if workers == 1:
            run_alone(work)
        else:
            run_shared(work, min(workers, len(left)))
    except KeyboardInterrupt:
        finished = sum(job.path(work.output).exists() for job in work.jobs)
        message = f"Interrupted: {finished} of {len(work.jobs)} runs are finished and kept. "
        print(f"\n{message}The same command goes on from there.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _report(plans: list[Plan], output: Path) -> None:
    """Report on each folder that has runs, then on all together."""
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    found = [plan for plan in plans if any(plan.folder(output).glob("*.json"))]
    if not found:
        folders = ", ".join(str(plan.folder(output)) for plan in plans)
        raise SystemExit(f"there is no finished run in {folders}")
    for plan in found:
        compare_report.report(plan.folder(output), command)
    compare_summary.report(found, output)
