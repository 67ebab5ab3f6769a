"""``python -m benchmarks compare``: what it runs, keeps, refuses and reports."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.commands.options import parse_methods
from benchmarks.data.tasks import TASKS, Task
from benchmarks.methods import registry as methods
from benchmarks.reports.watched_stages import watched_stages
from benchmarks.runs import compare, workers

from .commands import assert_refused, numbers, plan_of, tiny_command

OPTIONS = (
    "compare --task numbers --model tiny --methods adamw,bracket,prodigy --lrs 1e-3,1e-2 "
    "--seeds 0 --batch-size 4 --rank 2 --block 8 --steps 9 --interval 3 "
    "--validation 4 --pool 8 --test 6 --train-blocks 30 --device cpu"
)
FOLDER = "numbers-tiny-r2-b4-t8-n9"
RUNS = [
    f"{name}-seed0.json"
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
    last = "5/5 numbers 9: prodigy, constant, lr 1, seed 0"
    assert last in result.output, "progress bars"

    run = json.loads((folder / "bracket-linear-lr0.001-seed0.json").read_text())
    setting = {"task": "numbers", "rank": 2, "pool": 8, "tf32": False}
    assert run["setting"] | setting == run["setting"]
    assert (run["method"], run["schedule"]) == ("bracket", "linear")
    assert (run["lr"], run["seed"], run["diverged"]) == (1e-3, 0, False)
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
    first = command()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / FOLDER).glob("*seed*")}
    assert first.loads == 1
    (tmp_path / FOLDER / "table.md").unlink()
    for more in ("", "--no-run"):
        again = command(more)
        assert (again.exit_code, again.loads) == (0, 1), "not even the model is loaded"
        assert (tmp_path / FOLDER / "table.md").exists()
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / FOLDER).glob("*seed*")}
    assert before == after


def test_an_interrupted_command_goes_on_to_the_same_results(command, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command(output=whole).exit_code == 0

    with monkeypatch.context() as patch:
        patch.setattr(workers, "train_with_bar", interrupted_at_the_fourth(workers.train_with_bar))
        result = command(output=broken)
    assert result.exit_code == 130
    assert "3 of 5 runs are finished" in result.output
    assert sorted(path.name for path in (broken / FOLDER).iterdir()) == sorted(RUNS[:3])
    assert command(output=broken).exit_code == 0
    assert runs(broken) == runs(whole)


def interrupted_at_the_fourth(train_with_bar):
    calls = []

    def run(*args):
        calls.append(args)
        result = train_with_bar(*args)
        if len(calls) == 4:  # it has run, but nothing has been written
            raise KeyboardInterrupt
        return result

    return run


def test_a_run_of_another_setting_is_refused(command, tmp_path):
    few = "--methods adamw --lrs 1e-3"
    first = command(few)
    assert first.exit_code == 0
    path = tmp_path / FOLDER / "adamw-linear-lr0.001-seed0.json"
    before = path.read_bytes()
    result = command(f"{few} --interval 2")
    assert result.exit_code != 0
    assert f"{path} was written with other settings: interval 3 instead of 2" in str(
        result.exception
    )
    assert path.read_bytes() == before
    path.write_text("{")
    assert f"{path} is not the file of a run" in str(command(few).exception)
    assert first.loads == 1


def test_out_of_time_it_says_how_many_runs_are_left(command, tmp_path):
    assert command("--methods adamw --lrs 1e-3").exit_code == 0
    result = command("--minutes 0")
    assert result.exit_code == 0
    assert "4 of 5 runs are left" in result.output
    assert len(list(tmp_path.rglob("*seed*"))) == 1
    assert (tmp_path / FOLDER / "table.md").exists(), "what is there is reported on"


def test_lengths_and_tasks_have_folders_of_their_own_and_one_model(command, tmp_path, monkeypatch):
    letters = Task("letters", lambda: numbers(7), "made up too")
    monkeypatch.setitem(TASKS, "letters", letters)
    result = command("--task numbers,letters --steps 6,9 --methods adamw")
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
    assert command("--task letters --steps 9 --methods adamw", alone).exit_code == 0
    for path in (alone / f"{families[1]}-n9").glob("adamw*"):
        together = json.loads((tmp_path / path.parent.name / path.name).read_text())
        assert json.loads(path.read_text())["test_loss"] == together["test_loss"]


def test_blocks_of_tokens_can_be_brought_along(command, tmp_path):
    few = "--methods adamw --lrs 1e-3"
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
    assert "numbers.npz was written with other settings: test 6 instead of 5" in str(
        result.exception
    )


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--methods adamw,adam", "expected methods out of adamw, adamw-mean, reference"),
        ("--methods prodigy/linear", "prodigy supports the schedules constant, cosine, got linear"),
        ("--graphs", "Invalid value for --graphs: needs a GPU"),
        ("--lrs 1e-3,fast", "expected learning rates such as 1e-4,3e-3, got '1e-3,fast'"),
        ("--task cooking", "expected tasks out of medical, instruction, chat"),
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


@pytest.mark.parametrize(
    ("batch_size", "block", "blocks"),
    [(4, 24, 8), (16, 24, 16), (64, 128, 8), (64, 24, 32), (64, 64, 16)],
)
def test_a_trial_measures_a_thousand_tokens_but_no_more_than_a_step(batch_size, block, blocks):
    assert compare.default_validation(batch_size, block) == blocks


def test_a_method_can_have_schedules_and_rates_of_its_own():
    asked = parse_methods(
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
        parse_methods("adamw@fast")


def test_stages_are_put_to_the_test_if_asked(command, tmp_path):
    result = command("--methods repeat --lrs 1e-4 --test-stages --steps 30")
    assert result.exit_code == 0, result.output
    assert "stages that moved the weights were evaluated" in result.output
    folder = tmp_path / "numbers-tiny-r2-b4-t8-n30"
    assert (folder / "stages.png").stat().st_size > 5000
    run = json.loads((folder / "repeat-linear-lr0.0001-seed0.json").read_text())
    stages = watched_stages([run])
    moved = [stage for stage in run["stages"] if stage["tau"]]
    assert len(stages) == len(moved) > 0
    assert all(stage["test_before"] != stage["test_after"] for stage in moved)
