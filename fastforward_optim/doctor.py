"""The report of ``python -m fastforward_optim doctor``: what is installed, and whether it works.

Only torch is required. Optional packages are imported when the report runs, not with this module.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import io
import logging
import platform
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import torch
from torch import nn

from . import __version__
from .optimizer import FastForward

# Packages that the library can use, and the extra that installs each; "" if no extra does.
PACKAGES = {
    "peft": "peft",
    "transformers": "transformers",
    "accelerate": "transformers",
    "lightning": "lightning",
    "matplotlib": "plot",
    "pandas": "plot",
    "trl": "",
    "bitsandbytes": "",
}
# Our optional modules, and the packages that each needs.
PARTS = {
    "integrations.transformers": ("transformers", "accelerate"),
    "integrations.lightning": ("lightning",),
    "plotting": ("matplotlib",),
}
_FAILED = "failed: "


def report() -> dict[str, str]:
    """Return the findings by name. Takes a few seconds, mostly for imports."""
    found = {
        "fastforward_optim": f"{__version__} in {Path(__file__).parent}",
        "Python": f"{platform.python_version()} at {sys.executable}",
        "platform": platform.platform(),
        "torch": f"{torch.__version__}, {torch.version.cuda or torch.version.hip or 'CPU'} build",
    }
    found |= {name: _package(name, extra) for name, extra in PACKAGES.items()}
    for name, needs in PARTS.items():
        if missing := [package for package in needs if not _works(found[package])]:
            found[name] = f"not tried: needs {', '.join(missing)}"
        else:
            found[name] = _attempt(partial(_import, f"{__package__}.{name}"))
    for device in devices():
        found[f"stage on {device}"] = _attempt(partial(_seconds, device))
    return found


def has_failed(found: dict[str, str]) -> bool:
    """Return True if anything that is installed fails. A missing package is not a failure."""
    return any(value.startswith(_FAILED) for value in found.values())


def to_text(found: dict[str, str]) -> str:
    """Format the report as aligned lines."""
    width = max(map(len, found)) + 2
    return "\n".join(f"{name + ':':{width}}{value}" for name, value in found.items())


def devices() -> list[str]:
    """Return the names of the devices that torch can use, the CPU first."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count()))]


def run_stage(device: str) -> None:
    """Train for six steps with two stages.

    Raises:
        RuntimeError: there were not two stages, or the loss at the end is not the one that the last
            stage recorded.
    """
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).to(device)
    inputs = torch.linspace(-1, 1, 256).view(32, 8).sin().to(device)
    targets = inputs.sum(1, keepdim=True)

    def loss() -> torch.Tensor:
        return nn.functional.mse_loss(model(inputs), targets)

    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4)
    optimizer = FastForward(adamw, loss, interval=3, max_interval=3)
    for _ in range(6):
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()
    records = optimizer.history
    if len(records) != 2 or records[-1].loss_after != float(loss()):
        raise RuntimeError(f"the stage left other weights than it measured: {records}")


def _import(name: str) -> str:
    importlib.import_module(name)
    return "ok"


def _seconds(device: str) -> str:
    run_stage(device)  # warm-up
    start = time.perf_counter()
    run_stage(device)
    return f"ok, {1000 * (time.perf_counter() - start):.0f} ms for six steps with two stages"


def _package(name: str, extra: str) -> str:
    # A folder that happens to have the package's name has a spec without an origin.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        wanted = f"'fastforward-optim[{extra}]'" if extra else name
        return f"not installed: pip install {wanted}"
    result = _attempt(partial(_import, name))
    if not _works(result):
        return result
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _works(value: str) -> bool:
    return not value.startswith((_FAILED, "not installed"))


def _attempt(function: Callable[[], str]) -> str:
    """Call a function; return its result, or its error in one line. Its output is hidden."""
    logging.disable()
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            return function()
    except Exception as error:  # a broken package may raise anything
        lines = str(error).strip().splitlines() or [""]
        return f"{_FAILED}{type(error).__name__}: {lines[0]}"
    finally:
        logging.disable(logging.NOTSET)
