"""``paper`` and ``report``: the paper's evaluation, and its tables and figures."""

from __future__ import annotations

import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..data.tasks import MEDICAL, TASKS
from ..models.pretrained import MODELS
from ..reports import paper as paper_report
from ..runs import paper
from .options import Device, Dtype, check_pool, choose, parse, parse_methods


class Preset(StrEnum):
    """The names of ``PRESETS``."""

    small = "small"
    paper = "paper"


PRESETS_HELP = "\n\n".join(
    f"{name}: {', '.join(f'{k} {v}' for k, v in preset.items()) or 'the defaults above'}."
    for name, preset in paper.PRESETS.items()
)


def _setting(help_text: str, *flags: str, default: Any = None, **limits: Any) -> Any:
    """An option whose default comes from the preset."""
    return typer.Option(*flags, help=help_text, show_default=default or False, **limits)


def paper_command(
    context: typer.Context,
    preset: Annotated[Preset, typer.Option(help="Defaults of the options below.")] = Preset.small,
    task: Annotated[
        str, typer.Option(help=f"Tasks, comma-separated: {', '.join(TASKS)}.")
    ] = MEDICAL.name,
    methods: Annotated[
        str, typer.Option(help="Methods to compare with AdamW, comma-separated, as in `compare`.")
    ] = "bracket,reference",
    fast_forward: Annotated[
        bool,
        typer.Option(
            "--fast-forward/--no-fast-forward", help="Compare methods, or train the baseline alone."
        ),
    ] = True,
    study: Annotated[
        str | None, typer.Option(help=f"Vary a setting: {', '.join(paper.STUDIES)}.")
    ] = None,
    source: Annotated[
        str | None,
        _setting(
            "embedded (texts from packages), hub (the paper's data sets), or a folder or file with "
            "the fields of those.",
            default="embedded",
        ),
    ] = None,
    model_name: Annotated[
        str | None,
        _setting(f"{', '.join(MODELS)}, a causal LM of the hub, or a folder.", default="smollm2"),
    ] = None,
    lr: Annotated[float | None, _setting("Learning rate.", default="2e-05")] = None,
    accumulation_steps: Annotated[
        int | None, _setting("Batches in a step.", default="1", min=1)
    ] = None,
    batch_size: Annotated[int | None, _setting("Blocks in a batch.", default="64", min=1)] = None,
    eval_batch_size: Annotated[
        int | None, _setting("Blocks in a batch of the held-out sets.", default="64", min=1)
    ] = None,
    tokenizer_max_length: Annotated[
        int | None, _setting("Tokens in a block.", default="128", min=2)
    ] = None,
    lora_rank: Annotated[int | None, _setting("Rank of the adapter.", default="64", min=1)] = None,
    lora_alpha: Annotated[
        int | None, _setting("Scale of the adapter times its rank.", default="16")
    ] = None,
    lora_dropout: Annotated[
        float | None, _setting("Dropout before the adapter.", default="0.0", min=0, max=1)
    ] = None,
    use_dora: Annotated[
        bool | None, _setting("Use DoRA instead of LoRA.", "--use-dora/--no-use-dora")
    ] = None,
    full: Annotated[bool | None, _setting("Train all weights.", "--full/--no-full")] = None,
    interval: Annotated[
        int | None, _setting("Real steps between stages.", default="6", min=1)
    ] = None,
    validation: Annotated[
        int | None, _setting("Blocks that a trial measures.", default="32", min=1)
    ] = None,
    pool: Annotated[
        int | None,
        _setting(
            "Blocks held out for validation; calibration measures other ones at each stage.",
            default="256",
            min=1,
        ),
    ] = None,
    test: Annotated[int | None, _setting("Blocks in the test set.", default="512", min=1)] = None,
    train_blocks: Annotated[
        int | None, _setting("Largest number of blocks to train on.", default="8000", min=1)
    ] = None,
    epochs: Annotated[
        float | None, _setting("Epochs of the baseline; no run costs more.", default="5", min=0)
    ] = None,
    until_idle: Annotated[
        bool | None,
        _setting(
            "Train until three stages in a row make no progress.", "--until-idle/--no-until-idle"
        ),
    ] = None,
    evaluate_every: Annotated[
        int | None, _setting("Steps between evaluations and checkpoints.", default="10", min=1)
    ] = None,
    dtype: Annotated[
        Dtype | None, _setting("Data type of the frozen weights.", default="float32")
    ] = None,
    flops_profiler: Annotated[
        bool | None,
        _setting(
            "Count FLOPs, or estimate them from the number of parameters.",
            "--flops-profiler/--no-flops-profiler",
        ),
    ] = None,
    compile_layers: Annotated[
        bool | None, _setting("Compile the decoder's layers.", "--compile/--no-compile")
    ] = None,
    cuda_graphs: Annotated[
        bool | None,
        _setting("Trials replay CUDA graphs, on a GPU.", "--cuda-graphs/--no-cuda-graphs"),
    ] = None,
    tf32: Annotated[bool | None, _setting("Matrix products in TF32.", "--tf32/--no-tf32")] = None,
    seed: Annotated[int | None, _setting("Seed of data, adapter and batches.", default="0")] = None,
    device: Device = "auto",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Keep finished runs and continue from the last checkpoint."),
    ] = False,
    output_dir: Annotated[
        Path, typer.Option(help="Output folder, with a folder for each setting.")
    ] = Path("results/paper"),
) -> None:
    """Run the paper's evaluation: the cost that methods save in reaching the loss of AdamW.

    AdamW trains for the given epochs. Each method then trains until its test loss is within 1e-4
    of AdamW's, at no higher cost than AdamW's.
    """
    chosen = [one.method for one in parse("--methods", parse_methods, methods)]
    if study is not None:
        choose("--study", paper.STUDIES, study)
    options = paper.PRESETS[preset] | paper.given(context.params.items())
    options |= {"compile": bool(compile_layers)}
    base = paper.Configuration(**options)
    check_pool(base.pool, base.validation)
    tasks = [name.strip() for name in task.split(",")]
    for name in tasks:
        choose("--task", TASKS, name)
    for name in tasks:
        for configuration in paper.configurations(replace(base, task=name), study):
            try:
                paper.evaluate(
                    configuration,
                    chosen if fast_forward else [],
                    output_dir,
                    device,
                    resume=resume,
                )
            except KeyboardInterrupt:
                print(
                    "\nInterrupted. Repeat the command with --resume to continue from the last "
                    "checkpoint.",
                    file=sys.stderr,
                )
                raise SystemExit(130) from None
    paper_report.report(output_dir)


def report_command(
    directory: Annotated[Path, typer.Argument(help="An --output-dir of `paper`.")],
) -> None:
    """Make the table and the figures of `paper` from the files of all runs in a folder."""
    paper_report.report(directory)
