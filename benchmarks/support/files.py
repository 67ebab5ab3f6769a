"""Result files: standard JSON, written atomically, and logs that can be resumed."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import IO, Any

from examples.checkpoint_file import replacing


def finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Write JSON atomically. NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write((json.dumps(finite(document), indent=1, allow_nan=False) + "\n").encode())


class Log:
    """A file of JSON lines. A resumed run truncates it to the size that its checkpoint recorded.

    Args:
        path: the file, created if it does not exist.
        size: bytes of an existing file to keep.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, size)
        self.file: IO[str] = path.open("a")

    def write(self, kind: str, **values: Any) -> None:
        """Append a line."""
        line = json.dumps({"kind": kind} | finite(values), allow_nan=False)
        self.file.write(line + "\n")

    def sync(self) -> int:
        """Flush everything to the disk and return the size of the file."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()
        self.file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log. An incomplete last line is dropped."""
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]
