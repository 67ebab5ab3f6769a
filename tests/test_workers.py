"""The processes of ``compare --workers``: who runs what, and what their command says."""

import subprocess
import sys

import pytest

from benchmarks.runs import workers

from .commands import numbers, tiny_command
from .test_compare import OPTIONS, runs


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command on a tiny model and task; more options replace those of the grid."""
    run = tiny_command(monkeypatch, OPTIONS, numbers())
    return lambda more="", output=tmp_path: run(["--output", str(output), *more.split()])


def test_the_clock_goes_by_the_longest_run_of_the_method_and_its_steps(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(workers.time, "time", lambda: now[0])
    clock = workers.Clock(end=1060.0)
    assert clock.fits("a", 100)
    clock.note("a", 100, 10.0)
    clock.note("a", 100, 30.0)
    clock.note("b", 100, 5.0)
    now[0] = 1040.0
    assert not clock.fits("a", 100)
    assert clock.fits("a", 50)
    assert clock.fits("b", 100)
    assert not clock.fits("unknown", 100), "which is taken to be as long as the longest"
    assert workers.Clock().fits("a", 100)


def test_a_run_is_claimed_once(tmp_path):
    one, other = workers.Claims(tmp_path), workers.Claims(tmp_path)
    assert one.take(0)
    assert not other.take(0)
    assert other.take(1)
    assert not one.take(1)


def test_workers_go_round_the_gpus(monkeypatch):
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    assert workers.worker_devices("cuda", 3) == ["cuda:0", "cuda:1", "cuda:0"]
    assert workers.worker_devices("cuda:1", 2) == ["cuda:1", "cuda:1"]
    assert workers.worker_devices("cpu", 2) == ["cpu", "cpu"]


def test_several_workers_share_the_runs_and_reach_the_same(command, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert command(output=alone).exit_code == 0
    words = [*OPTIONS.split(), "--output", str(shared), "--workers", "2"]
    found = subprocess.run(
        [sys.executable, "-m", "tests.tiny_benchmarks", *words], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("Loading tiny") == 2
    assert sum(" in " in line and "seed" in line for line in found.stderr.splitlines()) == 5
    assert runs(shared) == runs(alone)
