"""Results on the disk: JSON that every reader reads, whole or not there at all."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import IO, Any

from examples.checkpoint_file import replacing


def finite(value: Any) -> Any:
    """``value`` as JSON can hold it: a number that is not finite is null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_whole(path: Path, document: dict[str, Any]) -> None:
    """Write JSON: the file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write((json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


class Log:
    """JSON lines, that a resumed run cuts back to where its checkpoint is and goes on with.

    Args:
        path: of the file.
        size: bytes of what is there that are kept.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, size)
        self.file: IO[str] = path.open("a")

    def write(self, kind: str, **values: Any) -> None:
        """Add a line."""
        line = json.dumps({"kind": kind} | finite(values), allow_nan=False)
        self.file.write(line + "\n")

    def sync(self) -> int:
        """Put everything on the disk; return the size of the file."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()
        self.file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last one that was cut off is left out."""
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]
