"""Files that are replaced: by whole ones, as their users have set them, whoever else writes."""

import os
import stat

import pytest
import torch

from fastforward_optim import checkpoint_file, load_checkpoint, save_checkpoint
from fastforward_optim.checkpoint_file import replacing

LAST = {"step": 7}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.pt"
    save_checkpoint(path, LAST)
    return path


def names_in(folder):
    return [path.name for path in folder.iterdir()]


@pytest.mark.skipif(os.name == "nt", reason="no limits there")
@pytest.mark.parametrize("size", [100, 2_000, 10_000, 200_000, 400_000])
def test_a_disk_that_is_full_leaves_the_last_checkpoint(path, size):
    """The system refuses to write more than so many bytes: what a full disk looks like."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(path, {"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_checkpoint(path) == LAST
    assert names_in(path.parent) == ["run.pt"]


def test_an_error_that_the_caller_is_handling_is_not_taken_for_a_full_disk(path):
    nested = []
    for _ in range(5000):
        nested = [nested]
    try:
        raise OSError("the other disk is full")
    except OSError:
        with pytest.raises(RecursionError):
            save_checkpoint(path, {"nested": nested})


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_checkpoint(tmp_path / "nowhere" / "run.pt", LAST)


def test_leftovers_of_killed_processes_are_removed_and_others_files_are_not(tmp_path):
    path = tmp_path / "[run]*.pt"
    (tmp_path / f".{path.name}.0123abcd.tmp").write_bytes(b"PK half of it")
    others = [".run.pt.0123abcd.tmp", f"{path.name}.tmp", ".r.pt.01.tmp"]
    others += [f".{path.name}.best.0123abcd.tmp", f".{path.name}.0123abcd.0123abcd.tmp"]
    for name in others:
        (tmp_path / name).touch()
    save_checkpoint(path, LAST)
    assert sorted(names_in(tmp_path)) == sorted([path.name, *others])


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127], ids=["ascii", "two-bytes"])
def test_the_longest_names_are_saved_to_as_torch_saves_to_them(tmp_path, name):
    torch.save(LAST, tmp_path / name)
    with replacing(tmp_path / name) as file:
        temporary = file.name
    open(temporary, "wb").close()  # as if the process had been killed
    save_checkpoint(tmp_path / name, {"step": 8})
    assert load_checkpoint(tmp_path / name) == {"step": 8}
    assert names_in(tmp_path) == [name]


def test_two_that_save_to_the_same_name_at_once_leave_one_whole_checkpoint(path):
    """As all ranks do by mistake: the one that writes is not taken for one that was killed."""
    with replacing(path) as file:
        torch.save({"step": 1}, file)
        save_checkpoint(path, {"step": 2})
        assert load_checkpoint(path) == {"step": 2}
    assert load_checkpoint(path) == {"step": 1}
    assert names_in(path.parent) == ["run.pt"]


def another_process_cleans_up_before(monkeypatch, module, name, path):
    """Once, before the next call of a function: when two processes save to the same name."""
    real, left = getattr(module, name), [path]

    def call(*args):
        if left:
            checkpoint_file._remove_leftovers(left.pop())
        return real(*args)

    monkeypatch.setattr(module, name, call)
    return left


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
@pytest.mark.parametrize("before", ["fcntl.flock", "os.replace"], ids=["locked", "renamed"])
def test_what_is_not_locked_yet_or_not_renamed_yet_may_be_removed_by_another(
    path, before, monkeypatch
):
    module, name = before.split(".")
    module = getattr(checkpoint_file, module)
    with monkeypatch.context() as patch:
        left = another_process_cleans_up_before(patch, module, name, path)
        save_checkpoint(path, {"step": 8})
    assert left == [], "it has been called"
    assert load_checkpoint(path) == {"step": 8}
    assert names_in(path.parent) == ["run.pt"]


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_without_locks_checkpoints_are_saved_and_leftovers_stay(path, monkeypatch):
    def flock(*args):
        raise OSError("not supported")

    monkeypatch.setattr(checkpoint_file.fcntl, "flock", flock)
    leftover = path.with_name(".run.pt.0123abcd.tmp")
    leftover.touch()
    save_checkpoint(path, {"step": 8})
    assert load_checkpoint(path) == {"step": 8}
    assert sorted(names_in(path.parent)) == [leftover.name, "run.pt"]


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.mark.skipif(os.name == "nt", reason="no modes there")
def test_a_new_checkpoint_can_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "run.pt", LAST)
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "run.pt") == 0o640


@pytest.mark.skipif(os.name == "nt", reason="no modes there")
def test_a_checkpoint_that_is_replaced_keeps_its_mode_also_while_it_is_written(path):
    for mode in (0o600, 0o664):
        path.chmod(mode)
        with replacing(path) as file:
            assert mode_of(file.name) == mode
        assert mode_of(path) == mode


def test_a_link_stays_a_link(path, tmp_path):
    link = tmp_path / "latest.pt"
    link.symlink_to(path)
    save_checkpoint(link, {"step": 8})
    assert link.is_symlink()
    assert load_checkpoint(path) == {"step": 8}


def test_the_bytes_are_on_the_disk_before_the_name_is(path, monkeypatch):
    """What a power cut leaves cannot be tried; the order of the system's calls can be seen."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def call(*args, real=real, name=name):
            of = stat.S_ISDIR(os.fstat(args[0]).st_mode) if name == "fsync" else None
            calls.append((name, {None: "", True: "folder", False: "file"}[of]))
            return real(*args)

        monkeypatch.setattr(os, name, call)
    save_checkpoint(path, LAST)
    assert calls == [("fsync", "file"), ("replace", ""), ("fsync", "folder")]


def test_what_is_in_the_buffer_of_a_file_is_put_on_the_disk_too(path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
    with replacing(path) as file:
        file.write(b"a few bytes")
    assert sizes[0] == 11
