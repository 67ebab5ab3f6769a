"""Checkpoint files: what is saved is loaded, damaged ones are told, and nothing in them is run."""

import io
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch

from fastforward_optim import (
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)

from .conftest import DEVICES, same

GOOD = {"weights": torch.arange(100.0), "step": 7, "names": ["a", ("b", None)]}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.pt"
    save_checkpoint(path, GOOD)
    return path


def is_good(checkpoint):
    return (
        set(checkpoint) == set(GOOD)
        and same([checkpoint["weights"]], [GOOD["weights"]])
        and (checkpoint["step"], checkpoint["names"]) == (7, ["a", ("b", None)])
    )


def test_what_is_saved_is_loaded(path):
    assert is_good(load_checkpoint(path))
    assert is_good(load_checkpoint(str(path), map_location="cpu"))
    assert is_good(torch.load(path, weights_only=True))
    torch.save(GOOD, path)
    assert is_good(load_checkpoint(path))


def change_part(path, name, data):
    """Put other bytes into the archive, with check sums that are right."""
    with zipfile.ZipFile(path) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for part, was in parts.items():
            archive.writestr(part, data if part.endswith(f"/{name}") else was)


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_are_put_where_they_are_asked_for(device, tmp_path):
    save_checkpoint(tmp_path / "run.pt", {"weights": torch.zeros(3, device=device)})
    assert load_checkpoint(tmp_path / "run.pt")["weights"].device.type == "cpu"
    assert load_checkpoint(tmp_path / "run.pt", device)["weights"].device.type == device


def no_memory(storage, location):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("map_location", "error", "words"),
    [
        ("nowhere", RuntimeError, "don't know how to restore data location"),
        ({"cpu": "nowhere"}, RuntimeError, "don't know how to restore data location"),
        (no_memory, torch.OutOfMemoryError, "CUDA out of memory"),
        (3, TypeError, "not callable"),
    ],
    ids=["name", "dict", "memory", "number"],
)
def test_a_place_that_cannot_be_had_is_not_taken_for_damage(path, map_location, error, words):
    with pytest.raises(error, match=words):
        load_checkpoint(path, map_location)
    change_part(path, "data.pkl", b"")
    with pytest.raises(ValueError, match=r"is not one that torch\.save has written"):
        load_checkpoint(path, map_location)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_not_taken_for_damage(path):
    with pytest.raises(RuntimeError, match=r"torch\.cuda\.is_available\(\) is False"):
        load_checkpoint(path, "cuda")


class Unpicklable:
    def __reduce__(self):
        raise TypeError("cannot be pickled")


class Interrupted:
    def __reduce__(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (Unpicklable(), ValueError, "checkpoint holds what cannot be saved: cannot be pickled"),
        (lambda: 0, ValueError, "checkpoint holds what cannot be saved"),
        (Interrupted(), KeyboardInterrupt, None),
        (io.StringIO, ValueError, r"cannot be loaded without running code \(_io.StringIO\)"),
        (np.float64(1.0), ValueError, r"without running code \(numpy"),
    ],
    ids=["unpicklable", "function", "interrupted", "class", "numpy"],
)
def test_what_cannot_be_loaded_is_not_saved_and_the_last_checkpoint_stays(
    path, value, error, words
):
    before = path.read_bytes()
    with pytest.raises(error, match=words):
        save_checkpoint(path, {"weights": torch.zeros(1000), "value": value})
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_is_no_mapping_is_refused(path):
    with pytest.raises(TypeError, match="checkpoint must be a dict, got list"):
        save_checkpoint(path, [1, 2])
    assert is_good(load_checkpoint(path))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*run\.pt"):
        load_checkpoint(tmp_path / "run.pt")


def test_a_file_that_is_cut_off_anywhere_is_told(path):
    data = path.read_bytes()
    for size in [*range(0, len(data), 7), len(data) - 1]:
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"the checkpoint .*run\.pt is (cut off|damaged)"):
            load_checkpoint(path)


def test_a_bit_that_has_changed_is_told_or_does_not_matter(path):
    """``torch.load`` alone reads nine of ten such files without a word, with other weights."""
    data = path.read_bytes()
    draw = random.Random(0)
    told, unnoticed = 0, 0
    for _ in range(1000):
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            loaded = load_checkpoint(path)
        except ValueError:
            told += 1
        else:
            assert is_good(loaded), "it was in the padding"
            unnoticed += 1
    assert told > 500
    assert unnoticed > 0


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"", "is cut off or damaged"),
        (b"some text", "is not a checkpoint: it is not a zip archive, as torch.save writes it"),
        (pickle.dumps(GOOD["names"]), "is not a checkpoint"),
        ([1, 2], "is not a checkpoint: it holds a list"),
        (torch.zeros(2), "is not a checkpoint: it holds a Tensor"),
    ],
    ids=["empty", "text", "pickle", "list", "tensor"],
)
def test_what_is_no_checkpoint_is_told(path, value, words):
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        torch.save(value, path)
    with pytest.raises(ValueError, match=words):
        load_checkpoint(path)


def test_the_format_before_torch_1_6_is_told(path):
    torch.save(GOOD, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"is in the format of torch\.save before torch 1\.6, w"):
        load_checkpoint(path)
    save_checkpoint(path, torch.load(path, weights_only=True))
    assert is_good(load_checkpoint(path))


def test_another_archive_is_told(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "text")
    with pytest.raises(ValueError, match=r"is not one that torch\.save has written"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("pickled", "kind"),
    [
        (b"", "EOFError"),
        (b"\x80\x02h\x05.", "KeyError"),
        (b".", "IndexError"),
        (b"J\x01.", "error"),
        (b"K\x01Q.", "AssertionError"),
    ],
    ids=["empty", "reference", "end", "number", "storage"],
)
def test_a_part_that_torch_cannot_read_is_told(path, pickled, kind):
    change_part(path, "data.pkl", pickled)
    with pytest.raises(ValueError, match=rf"is not one that torch\.save has written: {kind}\("):
        load_checkpoint(path)


@pytest.mark.parametrize("pickled", [b"\x80\x02\x95.", b"\x80\x02cnope"], ids=["frame", "cut"])
def test_objects_of_which_torch_cannot_say_the_names_are_told(path, pickled):
    change_part(path, "data.pkl", pickled)
    with pytest.raises(ValueError, match="cannot be loaded without running code; it may"):
        load_checkpoint(path)


def test_a_tensor_with_too_few_bytes_is_told(path):
    change_part(path, "data/0", b"some")
    with pytest.raises(ValueError, match=r"is not one that torch\.save has written: Runtime"):
        load_checkpoint(path)


class Runs:
    """Pickled, it is a call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_named_and_not_run(path, tmp_path, zipped, monkeypatch):
    ran = tmp_path / "ran"
    torch.save({"weights": Runs(ran)}, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    words = r"running code \(posix\.mkdir\)" if zipped else "before torch 1.6"
    with pytest.raises(ValueError, match=words):
        load_checkpoint(path)
    assert not ran.exists()
    torch.load(path, weights_only=False)
    assert ran.exists(), "it would have been"


def draws():
    numbers = [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]
    return [*numbers, random.gauss(0, 1), np.random.randn()]


def test_the_generators_go_on_from_a_file(path):
    torch.manual_seed(3)
    np.random.randn()  # which keeps the second of a pair for the next call
    random.gauss(0, 1)
    save_checkpoint(path, {"random": random_state()})
    expected = draws()
    assert draws() != expected
    set_random_state(load_checkpoint(path)["random"])
    assert draws() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_generators_of_gpus_go_on_from_a_file(path):
    save_checkpoint(path, {"random": random_state()})
    expected = torch.rand(3, device="cuda").tolist()
    set_random_state(load_checkpoint(path)["random"])
    assert torch.rand(3, device="cuda").tolist() == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: {},
        lambda state: None,
        lambda state: state | {"torch": torch.zeros(3, dtype=torch.uint8)},
        lambda state: state | {"torch": "nonsense"},
        lambda state: state | {"python": [3, [1, 2], None]},
        lambda state: state | {"numpy": ["MT19937", [1], 0, 0, 0.0]},
    ],
)
def test_a_damaged_state_of_the_generators_is_told_and_changes_none(damage):
    state = random_state()
    expected = draws()
    set_random_state(state)
    with pytest.raises(ValueError, match=r"this is not what random_state\(\) returned"):
        set_random_state(damage(state))
    assert draws() == expected
