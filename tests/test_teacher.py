"""The benchmark on the fast problem: equal cost, tables, and the sweep that is kept."""

import json

from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.runs import teacher
from benchmarks.runs.teacher import Run, train

SMALL = [
    *("teacher", "--problems", "0", "--batch-sizes", "8", "--steps", "20"),
    *("--seeds", "0", "--lrs", "1e-2", "--workers", "1"),
]


def test_every_row_that_is_measured_is_charged():
    run = Run("calibrated", 0, 8, 40, 1e-2)
    outcome = train(run)
    assert 0 < outcome.part < 0.5
    assert outcome.rate != 1e-2
    assert train(run) == outcome, "it is the same each time"
    plain = train(Run("adamw", 0, 8, 40, 1e-2))
    assert (plain.part, plain.rate) == (0.0, 1e-2)


def test_the_command_writes_tables_and_keeps_the_sweep(tmp_path):
    options = ["--vary", "excess,cut", "--set", "slope=0.3", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, [*SMALL, *options])
    assert result.exit_code == 0, result.output
    table = (tmp_path / "table.md").read_text()
    assert "| 20 |" in table
    assert "| excess |" in table
    (cut,) = (line for line in table.splitlines() if line.startswith("| cut |"))
    assert cut.endswith("| - |"), "twice 0.7 cannot be"
    kept = [json.loads(line) for line in (tmp_path / "sweep.jsonl").read_text().splitlines()]
    assert sorted(run["lr"] for run, _ in kept) == sorted(teacher.SWEEP)
    assert all(run["method"] == "adamw" for run, _ in kept)
