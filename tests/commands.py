"""The benchmarks' commands, run in this process on a tiny model and task."""

import sys

from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.data.tasks import TASKS, Task
from benchmarks.models.pretrained import MODELS
from benchmarks.runs import compare

from .conftest import tiny_llama
from .test_benchmarks import Words


def tiny_command(monkeypatch, options, documents):
    """A function that runs a command with these options; more options replace those.

    The task is called numbers, the model tiny; the result says how often that has been loaded.
    """
    loads = []

    def load(dtype):
        loads.append(dtype)
        return tiny_llama(), Words()

    monkeypatch.setitem(TASKS, "numbers", Task("numbers", lambda: documents, "made up"))
    monkeypatch.setitem(MODELS, "tiny", load)

    def run(more):
        words = [*options.split(), *more]
        monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
        result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
        result.loads = len(loads)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def numbers(factor=1):
    """Documents of multiples, for the tiny model."""
    return [" ".join(str((n * k * factor) % 96) for k in range(1, 9)) for n in range(1, 200)]


def plan_of(task, steps):
    """The plan of a folder of made-up runs."""
    return compare.Plan(
        **{"task": task, "model": "tiny", "rank": 2, "batch_size": 4, "block": 8},
        **{"budget_steps": steps, "interval": 3, "validation": 4, "pool": 8, "test": 6},
        **{"train_blocks": 30, "dtype": "float32", "evaluations": 4},
        **{"test_stages": False, "compile": False, "graphs": False, "tf32": False},
    )


def assert_refused(result, words):
    """An option was wrong, in so many words, and nothing had been loaded by then."""
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", "").split())
    assert result.loads == 0
