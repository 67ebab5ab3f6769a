"""``examples/checkpoint_file.py``: files that are whole or not there, and generators that go on."""

import os
import random
import signal

import numpy as np
import pytest
import torch

from examples.checkpoint_file import (
    load_checkpoint,
    random_state,
    replacing,
    save_checkpoint,
    set_random_state,
)

from .conftest import flat

posix = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX system")
LAST = {"step": 7, "weights": torch.arange(6.0), "nested": [{"a": (1, "b")}]}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.pt"
    save_checkpoint(path, LAST)
    return path


def test_what_is_saved_is_loaded(path):
    assert flat(load_checkpoint(path)) == flat(LAST)
    save_checkpoint(path, {"step": 8})
    assert load_checkpoint(path) == {"step": 8}
    assert os.listdir(path.parent) == ["run.pt"]


@posix
def test_a_disk_that_is_full_leaves_the_last_checkpoint(path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        with pytest.raises((OSError, RuntimeError)):
            save_checkpoint(path, {"weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert flat(load_checkpoint(path)) == flat(LAST)
    assert os.listdir(path.parent) == ["run.pt"]


@posix
def test_the_bytes_are_on_the_disk_before_the_name_is(path, monkeypatch):
    events = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, real=real, name=name: (events.append(name), real(*args))
        )
    with replacing(path) as file:
        file.write(b"text")
    assert events == ["fsync", "replace", "fsync"]
    assert path.read_bytes() == b"text"


@posix
def test_a_link_stays_a_link(path, tmp_path):
    link = tmp_path / "latest.pt"
    link.symlink_to(path)
    save_checkpoint(link, {"step": 8})
    assert link.is_symlink()
    assert load_checkpoint(path) == {"step": 8}


def test_a_file_that_is_cut_off_anywhere_is_told(path):
    data = path.read_bytes()
    for size in range(0, len(data) - 1, 97):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match="is cut off or damaged"):
            load_checkpoint(path)


def test_a_bit_of_a_weight_that_has_changed_is_told(path):
    data = bytearray(path.read_bytes())
    at = data.index(torch.arange(6.0).numpy().tobytes())
    data[at + 5] ^= 1
    path.write_bytes(data)
    assert not torch.equal(torch.load(path, weights_only=True)["weights"], LAST["weights"])
    with pytest.raises(ValueError, match=r"is damaged: the check sum of .*data/0 is wrong"):
        load_checkpoint(path)


def test_the_generators_go_on_from_a_file(path):
    random.seed(1)
    save_checkpoint(path, {"random": random_state()})
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    set_random_state(load_checkpoint(path)["random"])
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected
