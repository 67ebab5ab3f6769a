"""``python -m benchmarks compare``: what it runs, keeps, refuses and reports."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import compare, compare_report, exact, files, methods
from benchmarks.__main__ import app
from benchmarks.runner import Comparison
from benchmarks.savings import savings, watched_stages

from .commands import assert_refused, tiny_command
from .conftest import tiny_lora
from .test_benchmarks import (
    SETTING,
    random_splits,
)

OPTIONS = (
    "compare --task numbers --model tiny --methods adamw,bracket,prodigy --lrs 1e-3,1e-2 "
    "--seeds 0,1 --batch-size 4 --rank 2 --block 8 --budget-steps 9 --interval 3 "
    "--validation 4 --pool 8 --test 6 --train-blocks 30 --device cpu"
)
FOLDER = "numbers-tiny-r2-b4-t8-n9"
RUNS = [
    f"{name}-seed{seed}.json"
    for seed in (0, 1)
    for name in (
        *("adamw-lr0.001", "adamw-lr0.01", "bracket-lr0.001", "bracket-lr0.01"),
        "prodigy-lr1",
    )
]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command on a tiny model and task; more options replace those above."""
    documents = [" ".join(str((n * k) % 96) for k in range(1, 9)) for n in range(1, 200)]
    run = tiny_command(monkeypatch, OPTIONS, documents)
    return lambda more="", output=tmp_path: run(["--output", str(output), *more.split()])


def runs(folder):
    """What the files of the runs hold, without what depends on the machine's speed."""
    found = {}
    for name in RUNS:
        run = json.loads((folder / FOLDER / name).read_text())
        for key in ("seconds", "about"):
            del run[key]
        run["curve"] = [(flops, loss) for flops, _, loss in run["curve"]]
        for stage in run["stages"]:
            del stage["seconds"]
        found[name] = run
    return found


def test_the_runs_are_kept_with_their_setting_and_reported_on(command, tmp_path):
    result = command()
    assert result.exit_code == 0, result.output
    folder = tmp_path / FOLDER
    outputs = ["results.json", "table.md", "loss-vs-cost.png", "loss-vs-lr.png"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*RUNS, *outputs])
    assert "10/10 prodigy, lr 1, seed 1" in result.output, "progress bars"

    run = json.loads((folder / "bracket-lr0.001-seed1.json").read_text())
    setting = {"task": "numbers", "rank": 2, "pool": 8, "tf32": False}
    assert run["setting"] | setting == run["setting"]
    assert (run["method"], run["lr"], run["seed"], run["diverged"]) == ("bracket", 1e-3, 1, False)
    assert run["test_loss"] == run["curve"][-1][2] != run["initial_test_loss"]
    assert run["flops"] == run["curve"][-1][0] > 0
    assert run["trials"] == sum(stage["passes"] for stage in run["stages"]) > 0
    assert {"date", "device", "versions", "command", "source"} == run["about"].keys()

    table = (folder / "table.md").read_text()
    for text in (table, result.output):
        assert all(text.count(f"{name} ") >= 2 for name in ("adamw", "bracket"))
        assert "prodigy" in text
        assert "pool of 8 blocks" in text
    assert sum(line.startswith("| ") for line in table.splitlines()) == 2 + 5
    document = json.loads((folder / "results.json").read_text())
    assert len(document["runs"]) == len(RUNS)
    assert {"date", "command", "device", "versions", "source"} <= document["about"].keys()
    assert document["about"]["source"] == ["made up"]
    for name in ("loss-vs-cost.png", "loss-vs-lr.png"):
        assert (folder / name).stat().st_size > 10_000


def test_finished_runs_are_not_run_again_and_no_run_only_reports(command, tmp_path):
    first = command("--seeds 0")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / FOLDER).glob("*seed*")}
    assert first.loads == 1
    (tmp_path / FOLDER / "table.md").unlink()
    for more in ("--seeds 0", "--no-run"):
        again = command(more)
        assert (again.exit_code, again.loads) == (0, 1), "not even the model is loaded"
        assert (tmp_path / FOLDER / "table.md").exists()
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / FOLDER).glob("*seed*")}
    assert before == after


def test_an_interrupted_command_goes_on_to_the_same_results(command, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command(output=whole).exit_code == 0

    with monkeypatch.context() as patch:
        patch.setattr(compare, "run_with_bar", interrupted_at_the_fourth(compare.run_with_bar))
        result = command(output=broken)
    assert result.exit_code == 130
    assert "3 of 10 runs are finished" in result.output
    assert sorted(path.name for path in (broken / FOLDER).iterdir()) == sorted(RUNS[:3])
    assert command(output=broken).exit_code == 0
    assert runs(broken) == runs(whole)


def interrupted_at_the_fourth(run_with_bar):
    calls = []

    def run(*args):
        calls.append(args)
        result = run_with_bar(*args)
        if len(calls) == 4:  # it has run, but nothing has been written
            raise KeyboardInterrupt
        return result

    return run


def test_a_run_of_another_setting_is_refused(command, tmp_path):
    few = "--methods adamw --lrs 1e-3 --seeds 0"
    assert command(few).exit_code == 0
    path = tmp_path / FOLDER / "adamw-lr0.001-seed0.json"
    before = path.read_bytes()
    result = command(f"{few} --interval 2")
    assert result.exit_code != 0
    assert f"{path} is of another setting (interval 3 instead of 2)" in str(result.exception)
    assert path.read_bytes() == before
    path.write_text("{")
    assert f"{path} is no record of a run" in str(command(few).exception)


def test_out_of_time_it_says_how_many_runs_are_left(command, tmp_path):
    result = command("--minutes 0")
    assert result.exit_code == 0
    assert "10 of 10 runs are left" in result.output
    assert not list(tmp_path.rglob("*seed*"))


def test_the_clock_goes_by_the_longest_run_of_the_method(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(compare.time, "perf_counter", lambda: now[0])
    clock = compare.Clock(minutes=1, started=0.0)
    assert clock.fits("a")
    clock.note("a", 10.0)
    clock.note("a", 30.0)
    clock.note("b", 5.0)
    now[0] = 40.0
    assert not clock.fits("a")
    assert clock.fits("b")
    assert not clock.fits("unknown"), "which is taken to be as long as the longest"
    assert compare.Clock(None, 0.0).fits("a")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--methods adamw,adam", "unknown: adam; choose of adamw, adamw-linear, reference"),
        ("--lrs 1e-3,fast", "expected learning rates such as 1e-4,3e-3, got '1e-3,fast'"),
        ("--lrs -1", "expected learning rates"),
        ("--seeds 0.5", "expected seeds such as 0,1,2, got '0.5'"),
        ("--task cooking", "'cooking' is none of medical, instruction, chat"),
        ("--model gpt", "'gpt' is none of smollm2"),
        ("--pool 9", "must be a multiple of --validation (4), got 9"),
    ],
)
def test_what_is_unknown_or_cannot_be_is_one_clear_error(command, options, line):
    result = command(options)
    assert_refused(result, line)


def test_a_missing_package_is_one_line(command, monkeypatch):
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda name: None)
    result = command("--methods prodigy,schedulefree")
    assert str(result.exception) == ("missing packages: run `pip install prodigyopt schedulefree`")


def test_nothing_to_report_on_is_one_line(command, tmp_path):
    result = command("--no-run")
    assert str(result.exception) == f"there is no finished run in {tmp_path / FOLDER}"


def test_help_lists_every_method():
    text = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "120"}).output
    for method in methods.METHODS.values():
        assert f"{method.name}: {method.about}" in text


def made_up(method, lr, seed, loss, **more):
    """A run's file, as far as the report reads it."""
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "test_loss": loss,
        "initial_test_loss": 4.0,
        "steps": 10,
        "trials": 6,
        "stages": [{}, {}],
        "flops": 2e12,
        "seconds": 1.5,
        "curve": [[0, 0, 4.0], [1e12, 1, 3.5], [2e12, 1.5, loss]],
        "setting": {
            **{"task": "numbers", "test": 6, "budget_steps": 9, "batch_size": 4, "block": 8},
            **{"validation": 4, "pool": 8},
        },
        "costs": {"step": 100, "trial": 25},
        "about": dict.fromkeys(("device", "versions", "source"), "some"),
        **more,
    }


def test_the_table_compares_with_the_best_constant_rate(tmp_path):
    found = [
        made_up("adamw", 1e-3, 0, 2.0),
        made_up("adamw", 1e-3, 1, 2.2, curve=[[0, 0, 4.0], [2e12, 1.5, 2.2]]),
        made_up("adamw", 1e-2, 0, None, curve=[[0, 0, 4.0], [1e12, 1, None]]),
        made_up("adamw", 1e-2, 1, 1.0),
        made_up("calibrated", 1e-4, 0, 2.31),
        made_up("calibrated", 1e-3, 0, 1.89),
        made_up("prodigy", 1.0, 0, None, curve=[[0, 0, 4.0], [1e12, 1, None]]),
    ]
    for run in found:
        path = tmp_path / f"{run['method']}-{run['lr']}-{run['seed']}.json"
        files.write_whole(path, run)
    compare_report.report(tmp_path, "a command")
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:7]] for line in lines[2:7]]
    assert rows == [
        ["adamw", "0.001", "2", "**2.1000**", "2.0000 to 2.2000", "+0.00 %"],
        ["adamw", "0.01", "2", "diverged (1 of 2)", "1.0000 to 1.0000", "-"],
        ["calibrated", "0.0001", "1", "2.3100", "2.3100 to 2.3100", "+10.00 %"],
        ["calibrated", "0.001", "1", "**1.8900**", "1.8900 to 1.8900", "-10.00 %"],
        ["prodigy", "-", "1", "diverged (1 of 1)", "-", "-"],
    ]
    assert "costs 0.25 of one" in "\n".join(lines)
    assert json.loads((tmp_path / "results.json").read_text())["runs"] == sorted(
        found, key=lambda run: f"{run['method']}-{run['lr']}-{run['seed']}"
    )
    assert (tmp_path / "loss-vs-lr.png").stat().st_size > 10_000


def test_a_method_can_have_rates_of_its_own():
    asked = compare.parse_methods("adamw,loraplus@1e-4+3e-4,adamw@1e-2,prodigy")
    jobs = compare.grid(asked, [1e-3], [0])
    assert [(job.method.name, job.lr) for job in jobs] == [
        ("adamw", 1e-3),
        ("loraplus", 1e-4),
        ("loraplus", 3e-4),
        ("adamw", 1e-2),
        ("prodigy", 1.0),
    ]
    with pytest.raises(ValueError, match="expected learning rates"):
        compare.parse_methods("adamw@fast")


def test_the_cost_saved_is_that_of_reaching_the_baselines_loss():
    def run(method, lr, seed, curve):
        points = [[flops, 0.0, loss] for flops, loss in curve]
        ends = {"flops": curve[-1][0], "test_loss": curve[-1][1]}
        return {"method": method, "lr": lr, "seed": seed, "curve": points, **ends}

    found = savings(
        [
            run("adamw", 1e-4, 0, [(0, 4.0), (60, 3.5), (120, 3.0)]),
            run("adamw", 1e-4, 1, [(0, 4.0), (60, 3.5), (120, 3.1)]),
            run("calibrated", 1e-4, 0, [(0, 4.0), (12, 3.00005), (24, 2.5)]),
            run("calibrated", 1e-4, 1, [(0, 4.0), (12, 3.1002), (24, 3.0)]),
            run("reference", 1e-4, 0, [(0, 4.0), (120, 3.2)]),
        ]
    )
    rows = {row.method: row for row in found.itertuples()}
    assert rows["calibrated"].saved == pytest.approx((90 + 80) / 2)
    assert (rows["calibrated"].reached, rows["calibrated"].seeds) == (2, 2)
    assert (rows["reference"].reached, rows["reference"].seeds) == (0, 1)
    assert set(found["baseline"]) == {1e-4}


def test_stages_are_put_to_the_test_if_asked(command, tmp_path):
    result = command("--methods calibrated --lrs 1e-4 --seeds 0 --test-stages --budget-steps 30")
    assert result.exit_code == 0, result.output
    assert "stages moved the weights and were put to the test" in result.output
    folder = tmp_path / "numbers-tiny-r2-b4-t8-n30"
    assert (folder / "stages.png").stat().st_size > 5000
    run = json.loads((folder / "calibrated-lr0.0001-seed0.json").read_text())
    stages = watched_stages([run])
    moved = [stage for stage in run["stages"] if stage["tau"] or stage["averaged"]]
    assert len(stages) == len(moved) > 0
    assert run["stages"][-1]["test_after"] == run["test_loss"]


@pytest.mark.parametrize("best", [-3.0, 0.3, 7.0, 900.0])
def test_the_exact_line_search_finds_the_minimum(best):
    def function(tau):
        return 2 + ((tau - best) / best) ** 2

    losses = {tau: function(tau) for tau in (0.0, 1.0, 4.0)}

    def once(tau):
        return losses.setdefault(tau, function(tau))

    assert exact.refine(once, losses, -6.0) == pytest.approx(2, abs=1e-4)


@pytest.mark.parametrize("name", ["repeat", "bracket", "calibrated"])
def test_a_search_finds_no_more_than_the_exact_one(name):
    comparison = Comparison(tiny_lora(), random_splits(), SETTING)
    found = exact.measure(comparison, name, 1e-4, 9)
    assert len(found) >= 2
    assert all(0 <= one.decrease <= one.exact + 1e-12 for one in found)
    stages, trials, share = exact.summary(found)
    assert stages == len(found)
    assert trials >= 2
    assert 0 < share <= 1


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--task poems", "'poems' is none of medical, instruction, chat"),
        ("--searches golden", "'golden' is none of repeat, bracket, calibrated"),
        ("--lrs fast", "expected learning rates such as 1e-4,3e-3, got 'fast'"),
    ],
)
def test_line_search_names_what_it_does_not_know_before_it_loads_a_model(options, line):
    result = CliRunner().invoke(app, ["line-search", *options.split()], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert line in " ".join(result.output.replace("│", "").split())
