"""What the runs of ``compare`` are said to show: tables, savings, the summary over lengths."""

import json
from dataclasses import replace

import pytest

from benchmarks.reports import compare as compare_report
from benchmarks.reports import compare_summary
from benchmarks.reports.savings import savings
from benchmarks.support import files

from .commands import plan_of


def made_up(method, schedule, lr, seed, loss, **more):
    """A run's file, as far as the report reads it."""
    return {
        "method": method,
        "schedule": schedule,
        "lr": lr,
        "seed": seed,
        "test_loss": loss,
        "last_loss": None,
        "initial_test_loss": 4.0,
        "steps": 10,
        "epochs": 1.5,
        "trials": 6,
        "stages": [{}, {}],
        "flops": 2000,
        "seconds": 1.5,
        "curve": [[0, 0, 4.0], [1000, 1, 3.5], [2000, 1.5, loss]],
        "setting": {
            **{"task": "numbers", "test": 6, "budget_steps": 9, "batch_size": 4, "block": 8},
            **{"validation": 4, "pool": 8},
        },
        "costs": {"step": 100, "trial": 25},
        "about": dict.fromkeys(("device", "versions", "source"), "some"),
        **more,
    }


def write(folder, found):
    for run in found:
        name = f"{run['method']}-{run['schedule']}-{run['lr']}-{run['seed']}.json"
        files.write_json(folder / name, run)


def test_the_table_compares_with_the_best_rate_of_the_decays(tmp_path):
    write(
        tmp_path,
        [
            made_up("adamw", "constant", 1e-3, 0, 1.5),
            made_up("adamw", "linear", 1e-3, 0, 2.3),
            made_up("adamw", "cosine", 1e-3, 0, 2.0),
            made_up("adamw", "cosine", 1e-3, 1, 2.2, curve=[[0, 0, 4.0], [2000, 1.5, 2.2]]),
            made_up("adamw", "cosine", 1e-2, 0, None, curve=[[0, 0, 4.0], [1000, 1, None]]),
            made_up("adamw", "cosine", 1e-2, 1, 1.0),
            made_up("adamw", "cosine", 3e-2, 0, 4.5),
            made_up("adamw-mean", "constant", 1e-3, 0, 2.1, last_loss=2.5),
            made_up("calibrated", "linear", 1e-4, 0, 2.31),
            made_up("calibrated", "linear", 1e-3, 0, 1.89),
            made_up("prodigy", "cosine", 1.0, 0, None, curve=[[0, 0, 4.0], [1000, 1, None]]),
        ],
    )
    compare_report.report(tmp_path, "a command")
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:9]] for line in lines[2:11]]
    assert rows == [
        ["adamw", "constant", "0.001", "1", "**1.5000**", "1.5000 to 1.5000", "-28.57 %", "-"],
        ["adamw", "linear", "0.001", "1", "**2.3000**", "2.3000 to 2.3000", "+9.52 %", "-"],
        ["adamw", "cosine", "0.001", "2", "**2.1000**", "2.0000 to 2.2000", "+0.00 %", "-"],
        ["adamw", "cosine", "0.01", "2", "diverged (1 of 2)", "1.0000 to 1.0000", "-", "-"],
        # Far higher than before training.
        ["adamw", "cosine", "0.03", "1", "diverged (1 of 1)", "-", "-", "-"],
        [
            *("adamw-mean", "constant", "0.001", "1", "**2.1000**"),
            "2.1000 to 2.1000",
            "+0.00 %",
            "2.5000",
        ],
        ["calibrated", "linear", "0.0001", "1", "2.3100", "2.3100 to 2.3100", "+10.00 %", "-"],
        ["calibrated", "linear", "0.001", "1", "**1.8900**", "1.8900 to 1.8900", "-10.00 %", "-"],
        ["prodigy", "cosine", "-", "1", "diverged (1 of 1)", "-", "-", "-"],
    ]
    assert "costs 0.25 steps" in "\n".join(lines)
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 11


def test_the_summary_is_over_rates_and_seeds_and_then_over_tasks(tmp_path):
    base = plan_of("numbers", 9)
    short, long, other = base, replace(base, budget_steps=18), replace(base, task="letters")
    for plan, best in ((short, 2.0), (long, 1.0), (other, 4.0)):
        found = [
            made_up("adamw", "linear", 1e-3, 0, best * 1.5),
            made_up("adamw", "cosine", 1e-3, 0, best),
            made_up("calibrated", "linear", 1e-4, 0, best * 1.02),
            made_up("calibrated", "linear", 1e-3, 0, best * 1.01),
            made_up("calibrated", "constant", 1e-3, 0, None),
        ]
        write(plan.folder(tmp_path), found)
    compare_summary.report([short, long, other], tmp_path)
    lines = (tmp_path / "summary.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:-2]]
    part = "7.5 %"  # 6 trials of 25 out of 2000
    within, none = ["2", "+1.50 %", "+2.00 %", "0", part], ["1", "-", "-", "1", part]
    assert sorted(rows) == sorted(
        [
            ["linear", "9", "numbers", *within],
            ["linear", "9", "letters", *within],
            ["linear", "9", "all", "4", "+1.50 %", "+2.00 %", "0", part],
            ["linear", "18", "numbers", *within],
            ["constant", "9", "numbers", *none],
            ["constant", "9", "letters", *none],
            ["constant", "9", "all", "2", "-", "-", "2", part],
            ["constant", "18", "numbers", *none],
        ]
    )
    for task in ("numbers", "letters"):
        assert (tmp_path / f"{task}-tiny-r2-b4-t8.png").stat().st_size > 10_000


def test_the_cost_saved_is_that_of_reaching_the_baselines_loss():
    def run(method, schedule, seed, curve):
        points = [[flops, 0.0, loss] for flops, loss in curve]
        ends = {"flops": curve[-1][0], "test_loss": curve[-1][1]}
        cell = {"method": method, "schedule": schedule, "lr": 1e-4, "seed": seed}
        return cell | {"curve": points} | ends

    found = savings(
        [
            run("adamw", "constant", 0, [(0, 4.0), (60, 3.5), (120, 3.0)]),
            run("adamw", "constant", 1, [(0, 4.0), (60, 3.5), (120, 3.1)]),
            run("calibrated", "linear", 0, [(0, 4.0), (12, 3.00005), (24, 2.5)]),
            run("calibrated", "linear", 1, [(0, 4.0), (12, 3.1002), (24, 3.0)]),
            run("reference", "constant", 0, [(0, 4.0), (120, 3.2)]),
            run("adamw", "linear", 0, [(0, 4.0), (60, 2.9)]),
        ]
    )
    rows = {(row.method, row.schedule): row for row in found.itertuples()}
    ours = rows["calibrated", "linear"]
    assert ours.saved == pytest.approx((90 + 80) / 2)
    assert (ours.reached, ours.seeds) == (2, 2)
    reference = rows["reference", "constant"]
    assert (reference.reached, reference.seeds) == (0, 1)
    assert rows["adamw", "linear"].saved == pytest.approx(50)
    assert set(found["baseline"]) == {1e-4}
