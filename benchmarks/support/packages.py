"""Files that installed packages bring along."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def package_file(package: str, *parts: str, install: str) -> Path:
    """Path of a data file inside an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent.joinpath(*parts) if spec and spec.origin else None
    if path is None or not path.is_file():
        raise SystemExit(f"{'/'.join((package, *parts))} is missing: run `{install}`")
    return path
