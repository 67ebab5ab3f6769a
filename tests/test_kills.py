"""A run that is killed again and again ends where one that is never killed ends, bit for bit.

KILLS=500 python -m pytest tests/test_kills.py    # the default is 18 in all
"""

import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from examples.checkpoint_file import load_checkpoint

from .conftest import flat

ROOT = Path(__file__).parents[1]
STEPS, SAVE_EVERY = 40, 3
KILLS = int(os.environ.get("KILLS", "18"))
RUNS = {"plain": [], "calibrated": ["--calibrate-lr"]}
# In which part of the loop a process dies, and how far into its life: steps, trials, saves.
MOMENTS = {
    "step": lambda draw: {"number": draw.randint(1, 120)},  # of 28 tensors a step
    "trial": lambda draw: {"number": draw.randint(1, 10)},
    "candidate": lambda draw: {"number": draw.randint(1, 5)},
    "stage": lambda draw: {"number": draw.randint(1, 2)},
    "bytes": lambda draw: {"number": draw.randint(1, 2), "size": draw.randint(0, 90_000)},
    "fsync": lambda draw: {"number": draw.randint(1, 2)},
    "replace": lambda draw: {"number": draw.randint(1, 2)},
    "renamed": lambda draw: {"number": draw.randint(1, 2)},
}
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.lives"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def live(folder, arguments, kill=None):
        arguments = [
            *("--checkpoint", str(folder / "run.pt"), "--save-every", str(SAVE_EVERY)),
            *("--steps", str(STEPS), *arguments),
        ]
        process.stdin.write(json.dumps({"arguments": arguments, "kill": kill}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield live
    process.stdin.close()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(name, server, tmp_path):
    whole = tmp_path / "whole"
    whole.mkdir()
    assert server(whole, RUNS[name])["finished"]
    expected = load_checkpoint(whole / "run.pt")
    history = expected["optimizer"]["fast_forward"]["history"]
    assert len(history) >= 3, "the run has stages"
    assert any(record["tau"] != 0 for record in history), "and some of them move the weights"

    draw = random.Random(name)
    moments = [*MOMENTS, "any"]
    kills, left_over = Counter(), 0

    def next_kill():
        """The kinds of moments in turn; none any more when there have been enough."""
        done = sum(kills.values())
        if done == KILLS // len(RUNS):
            return None
        at = moments[done % len(moments)]
        if at == "any":
            return {"after": draw.uniform(0.0, 0.6)}
        return {"at": at, **MOMENTS[at](draw)}

    for number in itertools.count():
        folder = tmp_path / f"killed-{number}"
        folder.mkdir()
        outcome = {"finished": False}
        while not outcome["finished"]:
            kill = next_kill()
            outcome = server(folder, RUNS[name], kill)
            assert outcome["killed"] or outcome["finished"], "it failed by itself"
            if outcome["killed"]:
                kills[kill.get("at", "any")] += 1
                left_over += any(path.suffix == ".tmp" for path in folder.iterdir())
                if (folder / "run.pt").exists():  # and then it is whole, after each kill
                    saved = load_checkpoint(folder / "run.pt")
                    assert saved["step"] % SAVE_EVERY == 0 or saved["step"] == STEPS
        assert flat(load_checkpoint(folder / "run.pt")) == flat(expected)
        assert [path.name for path in folder.iterdir()] == ["run.pt"], "what was left is gone"
        if next_kill() is None:
            break
    assert min(kills[at] for at in moments) >= KILLS // len(RUNS) // len(moments), kills
    assert left_over >= kills["bytes"], "some were killed while they wrote"
