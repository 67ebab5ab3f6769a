"""The grid of ``paper``: its settings, its studies, and the folders of its runs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..comparison.comparison import Comparison, Setting
from ..data.blocks import split_and_pack
from ..data.hub import HUB_TASKS, hub_task
from ..data.tasks import TASKS, Task
from ..methods.registry import METHODS, check_installed
from ..methods.trainer import Method
from ..models.adapters import unfreeze, with_lora
from ..models.pretrained import load_model
from ..models.speed import compile_layers
from ..support.environment import environment, pick_device
from ..support.files import write_json
from .paper_run import CHECKPOINT, LOG, SUMMARY, Progress, Run, Until

BASELINE = "adamw"
CONFIGURATION = "configuration.json"

IDLE_STAGES = 3
"""The number of consecutive stages without progress after which the paper ends a run."""

OF_STAGES = {"interval", "validation", "until_idle", "cuda_graphs"}
"""Settings that do not affect the baseline: configurations that differ only in these share it."""


@dataclass(frozen=True)
class Configuration:
    """The settings of one comparison with the baseline, named like the options of ``paper``."""

    task: str = "medical"
    source: str = "embedded"
    model_name: str = "smollm2"
    lr: float = 2e-5
    batch_size: int = 64
    accumulation_steps: int = 1
    eval_batch_size: int = 64
    tokenizer_max_length: int = 128
    lora_rank: int = 64
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    use_dora: bool = False
    full: bool = False
    interval: int = 6
    validation: int = 32
    pool: int = 256
    test: int = 512
    train_blocks: int | None = 8000
    epochs: float = 5
    until_idle: bool = False
    evaluate_every: int = 10
    dtype: str = "float32"
    flops_profiler: bool = True
    compile: bool = False
    cuda_graphs: bool = False
    tf32: bool = False
    seed: int = 0

    @property
    def adapter(self) -> str:
        """A short name for what is trained."""
        return "full" if self.full else f"{'dora' if self.use_dora else 'lora'}-r{self.lora_rank}"

    @property
    def name(self) -> str:
        """The name of its folder, which has a file with all settings."""
        model = Path(self.model_name).name
        idle = "-idle" if self.until_idle else ""
        graphs = "-graphs" if self.cuda_graphs else ""
        return (
            f"{self.task}-{model}-{self.adapter}-lr{self.lr:g}-i{self.interval}"
            f"-v{self.validation}{idle}{graphs}-seed{self.seed}"
        )


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "paper": {
        "source": "hub",
        "model_name": "pythia-1.4b",
        "batch_size": 1,
        "accumulation_steps": 512,
        "eval_batch_size": 8,
        "tokenizer_max_length": 1024,
        "lora_dropout": 0.1,
        "test": 1000,
        "train_blocks": None,
        "dtype": "bfloat16",
    },
}
"""``paper`` has the authors' settings; ``small`` takes minutes on a single GPU."""

STUDIES: dict[str, list[dict[str, Any]]] = {
    "rank": [{"lora_rank": rank} for rank in (1, 4, 16, 64)],
    "dora": [{}, {"use_dora": True}],
    "full": [{}, {"full": True}],
    "interval": [{"interval": interval} for interval in (2, 6, 12, 24)],
    "validation": [{"validation": count} for count in (8, 32, 128)],
    "long": [{"until_idle": True}],
}
"""The paper's ablations: the settings that each of them varies."""


def configurations(base: Configuration, study: str | None) -> list[Configuration]:
    """Return ``base`` alone, or its variations in a study."""
    return [replace(base, **change) for change in STUDIES[study]] if study else [base]


def prepare(
    configuration: Configuration, device: torch.device
) -> tuple[Comparison, dict[str, str]]:
    """Load model and data; return the comparison and the conditions to store with its results."""
    c = configuration
    task = find_task(c.task, c.source)
    print(f"Loading {c.model_name} and the {c.task} task ({c.source}) ...", file=sys.stderr)
    if c.tf32:
        torch.set_float32_matmul_precision("high")
    model, tokenizer = load_model(c.model_name, getattr(torch, c.dtype))
    splits = split_and_pack(
        task,
        tokenizer,
        block=c.tokenizer_max_length,
        validation=c.pool,
        test=c.test,
        train=c.train_blocks,
        seed=c.seed,
    )
    if c.full:
        model = unfreeze(model)
    else:
        model = with_lora(
            model,
            rank=c.lora_rank,
            alpha=c.lora_alpha,
            dropout=c.lora_dropout,
            dora=c.use_dora,
            seed=c.seed,
        )
    steps = max(1, round(c.epochs * (splits.train.rows // (c.batch_size * c.accumulation_steps))))
    if splits.train.rows < c.batch_size * c.accumulation_steps:
        raise SystemExit(
            f"a step takes {c.batch_size * c.accumulation_steps} blocks, but the {c.task} task has "
            f"{splits.train.rows} to train on: lower --batch-size or --accumulation-steps"
        )
    setting = Setting(
        c.batch_size,
        budget_steps=steps,
        interval=c.interval,
        validation=c.validation,
        accumulation=c.accumulation_steps,
        evaluation_batch_size=c.eval_batch_size,
        count_flops=c.flops_profiler,
        cuda_graphs=c.cuda_graphs,
    )
    comparison = Comparison(model.to(device), splits, setting, c.seed)
    if c.compile:
        compile_layers(model)  # compiled layers cannot be counted
        comparison.warm_up()
    return comparison, environment(device) | {"source": task.source}


def find_task(name: str, source: str) -> Task:
    """Find a task by name, from the embedded texts, the hub, or a folder or file."""
    if source == "embedded":
        return TASKS[name]
    return HUB_TASKS[name] if source == "hub" else hub_task(name, source)


def evaluate(
    configuration: Configuration,
    methods: Sequence[Method],
    output: Path,
    device: str,
    *,
    resume: bool,
) -> None:
    """Train the baseline, then each method until its test loss is the baseline's.

    Args:
        configuration: the settings.
        methods: the methods to compare with the baseline; if empty, only the baseline is trained.
        output: the folder of the folders.
        device: ``auto`` or a name of torch's.
        resume: keep finished runs, and continue an interrupted one.

    Raises:
        SystemExit: the folder has runs with other settings, or runs and ``resume`` is False, or
            the baseline diverged.
    """
    folder = output / configuration.name
    _claim(folder, configuration, resume)
    _share_baseline(folder, configuration)
    names = [BASELINE, *(method.name for method in methods)]
    if all((folder / name / SUMMARY).exists() for name in names):
        return
    check_installed(list(methods))
    comparison, about = prepare(configuration, pick_device(device))
    write_json(folder / CONFIGURATION, asdict(configuration) | {"about": about})
    steps = int(comparison.setting.budget_steps)
    idle = IDLE_STAGES if configuration.until_idle else None

    def run(method: Method, until: Until) -> dict[str, Any]:
        path = folder / method.name
        if (path / SUMMARY).exists():
            found: dict[str, Any] = json.loads((path / SUMMARY).read_text())
            return found
        cell = Run(comparison, method, configuration.lr, until, path, configuration.evaluate_every)
        with _bar(f"{configuration.name} {method.name}", until) as progress:
            return cell.train(progress)

    baseline = run(METHODS[BASELINE], Until(steps))
    for method in methods:
        if baseline["test_loss"] is None:
            raise SystemExit(f"{BASELINE} diverged at --lr {configuration.lr:g}: lower it")
        target = None if idle else baseline["test_loss"]
        run(method, Until(steps, target, idle))


def _claim(folder: Path, configuration: Configuration, resume: bool) -> None:
    """Check that an existing folder has this configuration, and may be resumed."""
    path = folder / CONFIGURATION
    if not path.exists():
        return
    found = json.loads(path.read_text())
    differences = [
        f"--{name.replace('_', '-')} {found.get(name)!r} instead of {value!r}"
        for name, value in asdict(configuration).items()
        if found.get(name) != value
    ]
    if differences:
        raise SystemExit(
            f"{folder} was written with other settings: {'; '.join(differences)}. Choose another "
            "--output-dir"
        )
    if not resume and any(folder.glob(f"*/{LOG}")):
        raise SystemExit(
            f"{folder} has runs already: pass --resume to keep the finished ones and continue from "
            f"the last checkpoint ({CHECKPOINT}), or choose another --output-dir"
        )


def _share_baseline(folder: Path, configuration: Configuration) -> None:
    """Copy the finished baseline of another configuration in the same folder, if it is the same."""
    if (folder / BASELINE).exists():
        return
    settings = asdict(configuration)
    for path in sorted(folder.parent.glob(f"*/{CONFIGURATION}")):
        baseline = path.with_name(BASELINE)
        found = json.loads(path.read_text())
        same = all(found.get(name) == settings[name] for name in settings.keys() - OF_STAGES)
        if same and (baseline / SUMMARY).exists():
            shutil.copytree(baseline, folder / BASELINE)
            return


@contextmanager
def _bar(label: str, until: Until) -> Iterator[Progress]:
    """Show a progress bar of steps with the test loss."""
    with tqdm(total=until.steps, desc=label, unit="step") as bar:

        def show(steps: int, test_loss: float) -> None:
            bar.set_postfix_str(f"test loss {test_loss:.3f}", refresh=False)
            bar.update(steps - bar.n)

        yield show


def given(options: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Select the options that were given, by the names of ``Configuration``."""
    known = {field.name for field in fields(Configuration)}
    return {name: value for name, value in options if name in known and value is not None}
