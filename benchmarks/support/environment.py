"""The conditions of a measurement: date, hardware, versions, command."""

from __future__ import annotations

import platform
import sys
from datetime import date
from pathlib import Path

import torch
import transformers

from fastforward_optim import __version__


def pick_device(name: str) -> torch.device:
    """Return the named device; ``auto`` is the GPU if there is one, else the CPU."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cpu_name() -> str:
    """Return the name of the processor, or of its architecture if the system hides the name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment(device: torch.device) -> dict[str, str]:
    """Return the date, hardware, versions and command of this process."""
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{cpu_name()}, {torch.get_num_threads()} threads",
        "versions": f"fastforward-optim {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}",
        "command": command_line(),
    }


def command_line() -> str:
    """Return the command of this process."""
    return " ".join(["python -m benchmarks", *sys.argv[1:]])
