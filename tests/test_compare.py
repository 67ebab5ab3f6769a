"""``python -m benchmarks compare``: what it runs, keeps, refuses and reports."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from benchmarks import compare, compare_report, compare_summary, exact, files, methods, workers
from benchmarks.__main__ import app
from benchmarks.runner import Comparison
from benchmarks.savings import savings, watched_stages
from benchmarks.tasks import TASKS, Task

from .commands import assert_refused, numbers, tiny_command
from .conftest import tiny_lora
from .test_benchmarks import (
    SETTING,
    random_splits,
)

OPTIONS = (
    "compare --task numbers --model tiny --methods adamw,bracket,prodigy --lrs 1e-3,1e-2 "
    "--seeds 0,1 --batch-size 4 --rank 2 --block 8 --steps 9 --interval 3 "
    "--validation 4 --pool 8 --test 6 --train-blocks 30 --device cpu"
)
FOLDER = "numbers-tiny-r2-b4-t8-n9"
RUNS = [
    f"{name}-seed{seed}.json"
    for seed in (0, 1)
    for name in (
        *("adamw-linear-lr0.001", "adamw-linear-lr0.01"),
        *("bracket-linear-lr0.001", "bracket-linear-lr0.01"),
        "prodigy-constant-lr1",
    )
]


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command on a tiny model and task; more options replace those above."""
    run = tiny_command(monkeypatch, OPTIONS, numbers())
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
    outputs = ["results.json", "table.md", "loss-vs-cost.png"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*RUNS, *outputs])
    last = "10/10 numbers 9: prodigy, constant, lr 1, seed 1"
    assert last in result.output, "progress bars"

    run = json.loads((folder / "bracket-linear-lr0.001-seed1.json").read_text())
    setting = {"task": "numbers", "rank": 2, "pool": 8, "tf32": False}
    assert run["setting"] | setting == run["setting"]
    assert (run["method"], run["schedule"]) == ("bracket", "linear")
    assert (run["lr"], run["seed"], run["diverged"]) == (1e-3, 1, False)
    assert run["epochs"] == pytest.approx(run["steps"] * 4 / 30)
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
    for path in (folder / "loss-vs-cost.png", tmp_path / "numbers-tiny-r2-b4-t8.png"):
        assert path.stat().st_size > 10_000


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
        patch.setattr(workers, "run_with_bar", interrupted_at_the_fourth(workers.run_with_bar))
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
    first = command(few)
    assert first.exit_code == 0
    path = tmp_path / FOLDER / "adamw-linear-lr0.001-seed0.json"
    before = path.read_bytes()
    result = command(f"{few} --interval 2")
    assert result.exit_code != 0
    assert f"{path} is of another setting (interval 3 instead of 2)" in str(result.exception)
    assert path.read_bytes() == before
    path.write_text("{")
    assert f"{path} is no record of a run" in str(command(few).exception)
    assert first.loads == 1


def test_out_of_time_it_says_how_many_runs_are_left(command, tmp_path):
    assert command("--methods adamw --lrs 1e-3 --seeds 0").exit_code == 0
    result = command("--minutes 0")
    assert result.exit_code == 0
    assert "9 of 10 runs are left" in result.output
    assert len(list(tmp_path.rglob("*seed*"))) == 1
    assert (tmp_path / FOLDER / "table.md").exists(), "what is there is reported on"


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
    assert sum(" in " in line and "seed" in line for line in found.stderr.splitlines()) == 10
    assert runs(shared) == runs(alone)


class Inline:
    """In place of the processes of multiprocessing: run in this one when they are started."""

    def __init__(self, target, args):
        self.target, self.args, self.exitcode = target, args, 0

    def start(self):
        try:
            self.target(*self.args)
        except SystemExit as stopped:
            self.exitcode = stopped.code if isinstance(stopped.code, int) else 1

    def join(self):
        pass


@pytest.fixture
def inline(monkeypatch):
    context = type("Context", (), {"Process": Inline})
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda method: context)
    monkeypatch.setattr(workers.torch, "set_num_threads", lambda count: None)


@pytest.mark.usefixtures("inline")
def test_a_worker_that_fails_is_counted(command, tmp_path):
    result = command(f"--workers 2 --tokens {tmp_path / 'nowhere'}")
    assert str(result.exception) == "2 of 2 workers failed: see above"


@pytest.mark.usefixtures("inline")
def test_interrupted_workers_end_the_command_as_one_does(command, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Comparison, "run", interrupted)
    result = command("--workers 2")
    assert result.exit_code == 130
    assert "0 of 10 runs are finished" in result.output


def test_lengths_and_tasks_have_folders_of_their_own_and_one_model(command, tmp_path, monkeypatch):
    letters = Task("letters", lambda: numbers(7), "made up too")
    monkeypatch.setitem(TASKS, "letters", letters)
    result = command("--task numbers,letters --steps 6,9 --methods adamw --seeds 0")
    assert result.exit_code == 0, result.output
    assert result.loads == 1
    families = [f"{task}-tiny-r2-b4-t8" for task in ("numbers", "letters")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"{family}{end}" for family in families for end in ("-n6", "-n9", ".png")]
    )
    for family in families:
        found = [json.loads(path.read_text()) for path in tmp_path.glob(f"{family}-n*/adamw*")]
        assert sorted(run["steps"] for run in found) == [6, 6, 9, 9]
        assert len({run["initial_test_loss"] for run in found}) == 1
    alone = tmp_path / "alone"
    assert command("--task letters --steps 9 --methods adamw --seeds 0", alone).exit_code == 0
    for path in (alone / f"{families[1]}-n9").glob("adamw*"):
        together = json.loads((tmp_path / path.parent.name / path.name).read_text())
        assert json.loads(path.read_text())["test_loss"] == together["test_loss"]


def test_blocks_of_tokens_can_be_brought_along(command, tmp_path):
    few = "--methods adamw --lrs 1e-3 --seeds 0"
    assert command(few).exit_code == 0
    tokens = tmp_path / "tokens"
    options = f"--task numbers --model tiny --block 8 --pool 8 --test 6 --output {tokens}"
    assert CliRunner().invoke(app, ["tokens", *options.split()]).exit_code == 0
    result = command(f"{few} --tokens {tokens}", tmp_path / "again")
    assert result.exit_code == 0, result.output
    name = f"{FOLDER}/adamw-linear-lr0.001-seed0.json"
    first, again = (
        json.loads((path / name).read_text()) for path in (tmp_path, tmp_path / "again")
    )
    assert first["test_loss"] == again["test_loss"]
    assert again["about"]["source"] == "made up"
    result = command(f"{few} --tokens {tokens} --test 5", tmp_path / "other")
    assert "numbers.npz is of another setting (test 6 instead of 5)" in str(result.exception)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--methods adamw,adam", "unknown: adam; choose of adamw, adamw-mean, reference"),
        ("--methods prodigy/linear", "prodigy is run under constant or cosine, not linear"),
        ("--schedule steps", "expected schedules out of constant, linear, cosine, got 'steps'"),
        ("--steps 120,0", "expected steps such as 120,480, got '120,0'"),
        ("--graphs", "Invalid value for --graphs: needs a GPU"),
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


@pytest.mark.parametrize(("batch_size", "blocks"), [(4, 8), (16, 16), (64, 32)])
def test_a_trial_measures_as_much_as_a_step_trains_on_within_limits(batch_size, blocks):
    assert compare.default_validation(batch_size) == blocks


def test_help_lists_every_method():
    text = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "120"}).output
    for method in methods.METHODS.values():
        assert f"{method.name} ({', '.join(method.schedules)}): {method.about}" in text


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
        files.write_whole(folder / name, run)


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
            made_up("adamw-mean", "constant", 1e-3, 0, 2.1, last_loss=2.5),
            made_up("calibrated", "linear", 1e-4, 0, 2.31),
            made_up("calibrated", "linear", 1e-3, 0, 1.89),
            made_up("prodigy", "cosine", 1.0, 0, None, curve=[[0, 0, 4.0], [1000, 1, None]]),
        ],
    )
    compare_report.report(tmp_path, "a command")
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:9]] for line in lines[2:10]]
    assert rows == [
        ["adamw", "constant", "0.001", "1", "**1.5000**", "1.5000 to 1.5000", "-28.57 %", "-"],
        ["adamw", "linear", "0.001", "1", "**2.3000**", "2.3000 to 2.3000", "+9.52 %", "-"],
        ["adamw", "cosine", "0.001", "2", "**2.1000**", "2.0000 to 2.2000", "+0.00 %", "-"],
        ["adamw", "cosine", "0.01", "2", "diverged (1 of 2)", "1.0000 to 1.0000", "-", "-"],
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
    assert "costs 0.25 of one" in "\n".join(lines)
    assert len(json.loads((tmp_path / "results.json").read_text())["runs"]) == 10


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


def plan_of(task, steps):
    return compare.Plan(
        **{"task": task, "model": "tiny", "rank": 2, "batch_size": 4, "block": 8},
        **{"budget_steps": steps, "interval": 3, "validation": 4, "pool": 8, "test": 6},
        **{"train_blocks": 30, "dtype": "float32", "evaluations": 4},
        **{"test_stages": False, "compile": False, "graphs": False, "tf32": False},
    )


def test_a_method_can_have_schedules_and_rates_of_its_own():
    asked = compare.parse_methods(
        "adamw,loraplus/cosine@1e-4+3e-4,adamw/constant,prodigy,schedulefree@1e-2"
    )
    plan = plan_of("numbers", 9)
    jobs = compare.grid([plan], asked, ["linear", "cosine"], [1e-3], [0])
    assert [(job.method, job.schedule, job.lr) for job in jobs] == [
        ("adamw", "linear", 1e-3),
        ("adamw", "cosine", 1e-3),
        ("loraplus", "cosine", 1e-4),
        ("loraplus", "cosine", 3e-4),
        ("adamw", "constant", 1e-3),
        ("prodigy", "cosine", 1.0),
        ("schedulefree", "constant", 1e-2),
    ]
    assert {job.plan for job in jobs} == {plan}
    with pytest.raises(ValueError, match="expected learning rates"):
        compare.parse_methods("adamw@fast")


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


def test_stages_are_put_to_the_test_if_asked(command, tmp_path):
    result = command("--methods bracket --lrs 1e-4 --seeds 0 --test-stages --steps 30")
    assert result.exit_code == 0, result.output
    assert "stages moved the weights and were put to the test" in result.output
    folder = tmp_path / "numbers-tiny-r2-b4-t8-n30"
    assert (folder / "stages.png").stat().st_size > 5000
    run = json.loads((folder / "bracket-linear-lr0.0001-seed0.json").read_text())
    stages = watched_stages([run])
    moved = [stage for stage in run["stages"] if stage["tau"]]
    assert len(stages) == len(moved) > 0
    assert all(stage["test_before"] != stage["test_after"] for stage in moved)


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
