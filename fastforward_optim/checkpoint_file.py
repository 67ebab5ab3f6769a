"""Checkpoint files: whole or not there at all, and read without running what is in them.

Knows files and ``torch.save``. Knows nothing of what a checkpoint holds.
"""

from __future__ import annotations

import os
import pickle
import secrets
import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

try:
    import fcntl
except ImportError:  # Windows, which does not let go of a file that is open
    fcntl = None  # type: ignore[assignment]


def save_checkpoint(path: str | os.PathLike[str], checkpoint: Mapping[str, Any]) -> None:
    """Save a checkpoint so that ``path`` always holds a whole one: the new one, or the last.

    It is written under another name in the same folder, put on the disk and renamed. A process
    that is killed meanwhile leaves the last checkpoint as it was, and a file ``.NAME.*.tmp``
    beside it that the next call removes. ``torch.save`` itself would leave half a file in place
    of the last good one.

    Where several processes train, call it on one of them.

    Args:
        path: of the file, in a folder that exists. What is there is replaced, and its mode kept;
            of a symbolic link, what it leads to.
        checkpoint: names with what ``torch.load(weights_only=True)`` reads: tensors, numbers,
            strings, lists, tuples and dicts of them, such as state dicts and
            :func:`random_state`.

    Raises:
        TypeError: ``checkpoint`` is not a mapping.
        ValueError: it holds an object that could be saved, but not loaded without running code.
        OSError: it cannot be written there; the last checkpoint is still there.
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f"checkpoint must be a dict, got {type(checkpoint).__name__}")
    handled = sys.exception()  # where the call is in an except block
    with replacing(path) as file:
        try:
            torch.save(dict(checkpoint), file)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"checkpoint holds what cannot be saved: {error}") from error
        except RuntimeError as error:
            # After a write that failed, torch still ends its archive, and complains of the place.
            cause = error.__context__
            if isinstance(cause, OSError) and cause is not handled:
                raise cause from None
            raise
        # Found out now, and not when the run is to go on. mmap: the tensors are not read.
        _check_readable(Path(file.name), "checkpoint", "cpu", mmap=True)


def load_checkpoint(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Load what :func:`save_checkpoint` saved, or ``torch.save`` (since torch 1.6) of a dict.

    Nothing that is in the file is run (``weights_only=True``), and its check sums are compared,
    which ``torch.load`` does not do: a bit that has changed on the disk would become a weight.

    Args:
        path: of the file.
        map_location: the device of the tensors, as ``torch.load`` takes it. ``load_state_dict``
            moves them to where they belong from the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is cut off, damaged or not a checkpoint, or it holds objects that could not
            be loaded without running code.
        RuntimeError: of torch's, as of any other kind, where the file is whole and its tensors
            cannot be put at ``map_location``.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    _check_whole(path)
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception:
        _check_readable(path, f"the checkpoint {path}", _without_data)
        raise  # the file is as it should be
    if not isinstance(checkpoint, dict):
        raise ValueError(
            f"{path} is not a checkpoint: it holds a {type(checkpoint).__name__} and no dict"
        )
    return checkpoint


def _check_whole(path: Path) -> None:
    """Whether it is a file of torch's, with all its bytes as they were written."""
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
        except zipfile.BadZipFile as error:
            file.seek(0)
            raise ValueError(_why_no_archive(path, file.read(32))) from error
        # What zipfile raises at bytes that make no sense is not of one kind.
        except (OSError, RuntimeError, ValueError, EOFError, struct.error, zlib.error) as error:
            raise ValueError(f"the checkpoint {path} is damaged: {error}") from error
    if damaged is not None:
        raise ValueError(
            f"the checkpoint {path} is damaged: {damaged} in it is not what has been written"
        )


def _why_no_archive(path: Path, start: bytes) -> str:
    if b"PK".startswith(start[:2]):
        return f"the checkpoint {path} is cut off or damaged: its end is missing"
    if torch.serialization.MAGIC_NUMBER.to_bytes(10, "little") in start:
        return (
            f"{path} is in the format of torch.save before torch 1.6, which has no check sums: "
            "read it with torch.load(weights_only=True) and save it anew"
        )
    return f"{path} is not a checkpoint: it is not a zip archive, as torch.save writes it"


def _without_data(storage: torch.UntypedStorage, _: str) -> torch.UntypedStorage:
    """As ``map_location``: all is read, and not in memory at once; for "meta" nothing is read."""
    return torch.UntypedStorage(storage.nbytes(), device="meta")  # type: ignore[no-untyped-call]


def _check_readable(path: Path, name: str, map_location: Any, *, mmap: bool = False) -> None:
    """Whether torch reads a file, without running any of it."""
    try:
        torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        found: list[str] = []
        with suppress(Exception):  # it may end or break off, in whatever way, before a name
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        raise ValueError(
            f"{name} holds objects that cannot be loaded without running code"
            + (f" ({', '.join(sorted(found))})" if found else "")
            + "; it may hold tensors, numbers, strings, lists and dicts only"
        ) from error
    except (OSError, MemoryError):
        raise
    # What torch raises at a part that makes no sense is not of one kind.
    except Exception as error:
        raise ValueError(f"{name} is not one that torch.save has written: {error!r}") from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to be written that takes the place of ``path`` at the end, all at once.

    If there is an exception, or the process is killed, what was at ``path`` stays; if there is
    none, its mode does: a file that only its owner reads stays one. The bytes are
    on the disk before the name is: after a power cut too, the name never leads to half a file.
    """
    # Of a link, the file that it leads to: the new one has to be in the same file system.
    path = Path(os.path.realpath(path))
    _remove_leftovers(path)
    file = _new_temporary(path)
    temporary = Path(file.name)
    try:
        with file:
            with suppress(OSError):  # there may be nothing at path, or no modes there
                shutil.copymode(path, temporary)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:  # Windows; elsewhere it is renamed while it is locked
                file.close()
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # some systems cannot open folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _new_temporary(path: Path) -> IO[bytes]:
    """A new file beside ``path``, locked until it is closed, also by a kill."""
    while True:
        temporary = path.with_name(f".{_shortened(path.name)}.{secrets.token_hex(4)}.tmp")
        file = temporary.open("xb")
        if fcntl is not None:
            with suppress(OSError):  # some file systems have no locks: leftovers stay there
                fcntl.flock(file, fcntl.LOCK_EX)
        # Before it was locked, another process may have taken it for a leftover.
        if temporary.exists():
            return file
        file.close()


def _remove_leftovers(path: Path) -> None:
    """Remove what killed processes have left; what a living one writes to is locked."""
    # No other letters: ".run.pt.best.0123abcd.tmp" is not of "run.pt".
    name = _literally(_shortened(path.name))
    for leftover in path.parent.glob(f".{name}.{'[0-9a-f]' * 8}.tmp"):
        with suppress(OSError), leftover.open("r+b") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()


def _shortened(name: str) -> str:
    """A name that leaves room for the 14 bytes of ``..0123abcd.tmp`` in the 255 that may be."""
    while len(os.fsencode(name)) > 255 - 14:
        name = name[:-1]
    return name


def _literally(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
