"""What is installed here, whether it works, and what to do about what does not.

Behind ``python -m fastforward_optim doctor``. Needs torch alone. Optional packages are imported
when they are examined, not with this module.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import __version__, integrations
from .history import History
from .optimizer import FastForward
from .peft import lora_parameters

DISTRIBUTION = "fastforward-optim"


class Package(NamedTuple):
    """A package that the library can make use of.

    Attributes:
        name: of the distribution, and of the module.
        extra: which of our extras brings it; empty if none.
        used: what for.
    """

    name: str
    extra: str
    used: str


PACKAGES = (
    Package("torch", "", "everything"),
    Package("peft", "peft", "lora_parameters"),
    Package("transformers", "transformers", "integrations.transformers"),
    Package("accelerate", "transformers", "integrations.transformers"),
    Package("lightning", "lightning", "integrations.lightning"),
    Package("trl", "", "SFTTrainer, DPOTrainer"),
    Package("matplotlib", "plot", "History.plot"),
    Package("pandas", "plot", "History.to_dataframe"),
    Package("bitsandbytes", "", "8-bit optimizers, quantized models"),
)

# The integrations, and what each needs beside torch.
NEEDS = {"transformers": ("transformers", "accelerate"), "lightning": ("lightning",)}


@dataclass(frozen=True)
class Row:
    """One thing that was examined.

    Attributes:
        name: what it is.
        state: "ok", "not installed", "too old", "broken", or "not tried" where something that it
            needs is missing or has a problem of its own.
        version: of a package, or None.
        needs: the lowest version of it that is supported, or None.
        seconds: what a stage took, or None.
        about: what it is used for, what kind of device it is, or what is missing.
        remedy: what to do about it, in one line; empty where there is nothing to do.
    """

    name: str
    state: str
    version: str | None = None
    needs: str | None = None
    seconds: float | None = None
    about: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """All that was examined.

    Attributes:
        system: names and versions of what everything runs on.
        packages: what is installed.
        parts: of the library, tried.
        problems: what is installed and does not work, with what to do about it; one line each.
        notes: what could not be examined; one line each.
    """

    system: dict[str, str]
    packages: list[Row]
    parts: list[Row]
    problems: list[str]
    notes: list[str]


def examine() -> Report:
    """Try everything that is installed. Takes some seconds, most of them for imports."""
    lowest = lowest_versions()
    notes = []
    if lowest is None:
        notes.append(
            f"The lowest supported versions are not known, as {DISTRIBUTION} {__version__} is not "
            "installed (this runs from its source): `pip install -e .` there"
        )
    packages = [_examine_package(package, lowest or {}) for package in PACKAGES]
    usable = {row.name for row in packages if row.state == "ok"}
    unusable = {row.name: row.state for row in packages if row.state != "ok"}
    parts = []
    for device in devices():
        parts.append(_try_stage(f"stage on {device}", device, _plain))
        if "peft" in usable:
            parts.append(_try_stage(f"LoRA stage on {device}", device, _lora))
    tried: list[tuple[str, Sequence[str], Callable[[], object]]] = [
        ("history.plot()", ("matplotlib",), lambda: History().plot()),
        ("history.to_dataframe()", ("pandas",), lambda: History().to_dataframe()),
    ]
    for name, needs in NEEDS.items():
        module = f"{integrations.__name__}.{name}"
        tried.append((f"integrations.{name}", needs, _importer(module)))
    parts += [_try(name, needs, unusable, attempt) for name, needs, attempt in tried]
    problems = [f"{row.name}: {row.remedy}" for row in packages + parts if _is_problem(row)]
    return Report(_system(), packages, parts, problems, notes)


def _is_problem(row: Row) -> bool:
    return row.state in ("too old", "broken")


def _system() -> dict[str, str]:
    cuda = torch.version.cuda or torch.version.hip
    return {
        "fastforward_optim": f"{__version__} in {Path(__file__).parent}",
        "Python": f"{platform.python_version()} at {sys.executable}",
        "platform": platform.platform(),
        "torch's CUDA build": cuda or "none: a build for the CPU",
        "accelerators": ", ".join(map(_device_name, devices()[1:])) or "none",
    }


# Versions


def lowest_versions() -> dict[str, str] | None:
    """The lowest version of each package that the installed distribution asks for.

    Extras differ where one is for more than the library: the lowest counts. None if this package
    is not installed, or another version of it is.
    """
    try:
        distribution = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    if distribution.version != __version__:
        return None
    lowest: dict[str, str] = {}
    for line in distribution.requires or ():
        found = re.match(r"([\w.-]+)[^;]*?>=\s*([\w.]+)", line)
        if found:
            name, version = found[1].lower(), found[2]
            lowest[name] = min(version, lowest.get(name, version), key=_release)
    return lowest


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with, without zeros at the end: 5.0 is 5."""
    numbers = re.match(r"[0-9.]*", version)
    parts = [int(part) for part in (numbers[0] if numbers else "").split(".") if part]
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def _install(package: Package, options: str = "") -> str:
    what = f"'{DISTRIBUTION}[{package.extra}]'" if package.extra else package.name
    return f"pip install {options}{what}"


def _examine_package(package: Package, lowest: dict[str, str]) -> Row:
    needs = lowest.get(package.name)
    try:
        version = importlib.metadata.version(package.name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    spec = _find(package.name)
    if version is None and spec is None:
        about = f"for {package.used}"
        return Row(package.name, "not installed", None, needs, None, about, _install(package))
    if version and needs and _release(version) < _release(needs):
        remedy = f"{version} is older than {needs}, the lowest supported: "
        remedy += _install(package, "-U ")
        return Row(package.name, "too old", version, needs, None, f"for {package.used}", remedy)
    error = _failure(_importer(package.name))
    if error:
        remedy = f"cannot be imported ({error}): pip install --force-reinstall {package.name}"
        return Row(package.name, "broken", version, needs, None, f"for {package.used}", remedy)
    version = version or str(getattr(sys.modules[package.name], "__version__", "unknown"))
    return Row(package.name, "ok", version, needs, None, f"for {package.used}")


def _find(name: str) -> str | None:
    """Where a module is, if it is one: folders that happen to have its name are not."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return spec.origin if spec else None


# Trying things


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what other packages print, log and warn of: the report says whether they work."""
    logging.disable()
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _failure(attempt: Callable[[], object]) -> str:
    """What an attempt raised, in one line; empty if nothing."""
    try:
        with _quiet():
            attempt()
    except Exception as error:  # whatever is broken may raise anything
        lines = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {lines[0]}"
    return ""


def _importer(name: str) -> Callable[[], object]:
    return lambda: importlib.import_module(name)


def _try(
    name: str, needs: Sequence[str], unusable: dict[str, str], attempt: Callable[[], object]
) -> Row:
    """A part of the library, tried if all that it needs is there."""
    gone = [f"{package} is {unusable[package]}" for package in needs if package in unusable]
    if gone:
        return Row(name, "not tried", about=", ".join(gone))
    error = _failure(attempt)
    if error:
        remedy = f"fails ({error}): please report it, with the output of `doctor --json`"
        return Row(name, "broken", remedy=remedy)
    return Row(name, "ok")


def devices() -> list[str]:
    """Names of the devices that torch can use, the CPU first."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count()))]


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return device


def _try_stage(name: str, device: str, make: Callable[[], tuple[nn.Module, list[Tensor]]]) -> Row:
    seconds = 0.0

    def attempt() -> None:
        nonlocal seconds
        seconds = run_stage(*make(), device)

    error = _failure(attempt)
    if not error:
        return Row(name, "ok", seconds=seconds)
    remedy = f"fails ({error}): "
    if device == "cpu":
        remedy += "please report it, with the output of `doctor --json`"
    else:
        remedy += f"try torch alone there, `torch.ones(1, device={device!r})`: if that fails too, "
        remedy += "reinstall torch for your driver (https://pytorch.org/get-started)"
    return Row(name, "broken", remedy=remedy)


def _plain() -> tuple[nn.Module, list[Tensor]]:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    return model, list(model.parameters())


def _lora() -> tuple[nn.Module, list[Tensor]]:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(_plain()[0], LoraConfig(target_modules=["0", "2"]))
    return model, list(lora_parameters(model))


def run_stage(model: nn.Module, params: list[Tensor], device: str) -> float:
    """Train for six steps with two stages, and check the second.

    Args:
        model: takes rows of 8 numbers and gives one for each.
        params: the tensors of it to train.
        device: where.

    Returns:
        Seconds that the stage took.

    Raises:
        RuntimeError: the stage did not do what it promises.
    """
    model.to(device)
    inputs = torch.linspace(-1, 1, 256).view(32, 8).sin().to(device)
    targets = inputs.sum(1, keepdim=True)
    measured: list[tuple[float, list[Tensor]]] = []

    def loss() -> Tensor:
        return nn.functional.mse_loss(model(inputs), targets)

    def val_fn() -> Tensor:
        value = loss()
        measured.append((float(value), [p.detach().clone() for p in params]))
        return value

    optimizer = FastForward(torch.optim.AdamW(params, lr=1e-4), val_fn, interval=3)
    for _ in range(6):  # the first stage warms the device up
        measured.clear()
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()
    if len(optimizer.history) != 2:
        raise RuntimeError(f"{len(optimizer.history)} stages in 6 steps with interval=3")
    record = optimizer.history[-1]
    best, weights = min(measured, key=lambda trial: trial[0])
    if not record.loss_after <= record.loss_before:
        raise RuntimeError(f"loss {record.loss_before} before and {record.loss_after} after it")
    if record.loss_after != best:
        raise RuntimeError(f"loss {record.loss_after} left, {best} measured")
    if not all(torch.equal(p, q) for p, q in zip(params, weights, strict=True)):
        raise RuntimeError("the weights left are not those of the lowest loss measured")
    return record.seconds


# Showing it


def to_json(report: Report) -> str:
    """The report for a bug report."""
    return json.dumps(asdict(report), indent=1)


def to_text(report: Report) -> str:
    """The report in aligned lines."""
    packages = [
        (row.name, row.version or "-", f">={row.needs}" if row.needs else "", row.state, _hint(row))
        for row in report.packages
    ]
    parts = [
        (row.name, row.state, f"{1000 * row.seconds:.0f} ms" if row.seconds else row.about)
        for row in report.parts
    ]
    problems = [f"- {problem}" for problem in report.problems] or ["all that is installed works"]
    sections = {
        "": _aligned([(f"{name}:", value) for name, value in report.system.items()]),
        "Packages": _aligned(packages),
        "Tried": _aligned(parts),
        "Notes": [f"- {note}" for note in report.notes],
        "Problems": problems,
    }
    lines = []
    for title, content in sections.items():
        if content:
            lines += ["", *([title] if title else []), *(f"  {line}" for line in content)]
    return "\n".join(lines[1:])


def _hint(row: Row) -> str:
    return f"{row.about}: {row.remedy}" if row.state == "not installed" else row.about


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
