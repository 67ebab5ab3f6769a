"""``compare``: methods at equal cost, over learning rates, seeds, lengths and tasks."""

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
from ..support.environment import command_line, pick_device
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
        help="Blocks in the validation split; a multiple of --validation.",
        show_default=f"{POOL} or slightly fewer",
        min=1,
    ),
]
Validation = Annotated[
    int | None,
    typer.Option(
        help="Blocks that a trial measures.",
        show_default="8 to 32, about 1,000 tokens, no more than in a step",
        min=1,
    ),
]


def compare_command(
    task: Tasks = MEDICAL.name,
    model: Model = "smollm2",
    methods: Annotated[
        str,
        typer.Option(
            help="Methods, comma-separated; see the list below. A method can have its own "
            "schedules and learning rates: loraplus/linear+cosine@1e-4+3e-4."
        ),
    ] = "adamw,bracket,calibrated",
    schedule: Annotated[
        str,
        typer.Option(
            help=f"Schedules, comma-separated: {', '.join(SCHEDULES)}. A decay follows a warm-up "
            f"over {WARMUP:.0%} of the run. A method that supports none of the given schedules "
            "uses its own."
        ),
    ] = "linear",
    lrs: Annotated[
        str, typer.Option(help="Learning rates. Methods that ignore them run once per seed.")
    ] = "1e-5,1e-4,1e-3,3e-3,1e-2",
    seeds: Annotated[str, typer.Option(help="Seeds of adapter and batches.")] = "0,1,2",
    steps: Annotated[
        str, typer.Option(help="Lengths, comma-separated: budget of a run in plain steps.")
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
        typer.Option(help="Folder written by `tokens`, to use instead of the tasks' texts."),
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
        int, typer.Option(help="Evaluations on the test set in each run.", min=1)
    ] = 4,
    test_stages: Annotated[
        bool, typer.Option(help="Also evaluate before and after each stage (not charged).")
    ] = False,
    workers: Annotated[
        int, typer.Option(help="Processes that share the runs and take the GPUs in turn.", min=1)
    ] = 1,
    minutes: Annotated[
        float | None,
        typer.Option(help="Time limit: do not start runs that would end later.", min=0),
    ] = None,
    run: Annotated[bool, typer.Option(help="Run, or only report on existing runs.")] = True,
    output: Annotated[
        Path, typer.Option(help="Output folder, with a folder for each task and length.")
    ] = Path("results/compare"),
) -> None:
    """Compare methods at equal cost, over schedules, learning rates, seeds, lengths and tasks.

    Each run is a file: repeat an interrupted command to continue it. Tables and plots include all
    runs in the folders of these settings, also those of earlier commands.
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
        task=tasks[0],
        model=model,
        rank=rank,
        batch_size=batch_size,
        block=block,
        budget_steps=lengths[0],
        interval=interval,
        validation=validation,
        pool=pool,
        test=test,
        train_blocks=train_blocks,
        dtype=dtype.value,
        evaluations=evaluations,
        test_stages=test_stages,
        compile=compile_layers,
        graphs=graphs,
        tf32=tf32,
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
        print(f"Out of time: {left} of {len(jobs)} runs are left. Repeat the command to continue.")


def _fill(work: Work, workers: int) -> None:
    """Run the unfinished jobs.

    Raises:
        SystemExit: the command was interrupted (code 130), or a file has other settings.
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
        print(f"\n{message}Repeat the command to continue.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def _report(plans: list[Plan], output: Path) -> None:
    """Report on each folder with runs, then on all of them together."""
    found = [plan for plan in plans if any(plan.folder(output).glob("*.json"))]
    if not found:
        folders = ", ".join(str(plan.folder(output)) for plan in plans)
        raise SystemExit(f"there is no finished run in {folders}")
    for plan in found:
        compare_report.report(plan.folder(output), command_line())
    compare_summary.report(found, output)
