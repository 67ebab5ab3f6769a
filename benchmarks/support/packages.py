"""Data files in installed packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def package_file(package: str, *parts: str, install: str) -> Path:
    """Return the path of a data file in an installed package, without importing the package.

    Raises:
        SystemExit: the file is missing; the message names ``install``, the command to run.
    """
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent.joinpath(*parts) if spec and spec.origin else None
    if path is None or not path.is_file():
        raise SystemExit(f"{'/'.join((package, *parts))} is missing: run `{install}`")
    return path
