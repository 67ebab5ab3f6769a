"""``python -m benchmarks paper``: the protocol, what is kept, what goes on, what is reported."""

import json
import shutil

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.comparison.comparison import Comparison, Setting
from benchmarks.comparison.costs import PAPERS_STEP, UPDATE, WRITE
from benchmarks.models.adapters import with_lora
from benchmarks.reports import paper as paper_report
from benchmarks.runs import paper
from benchmarks.runs import paper_run as protocol
from benchmarks.support.files import read_log

from .commands import assert_refused, tiny_command
from .conftest import tiny_llama, tiny_lora
from .test_benchmarks import random_splits

OPTIONS = (
    "paper --task numbers --model-name tiny --lr 1e-5 --batch-size 4 --lora-rank 2 "
    "--tokenizer-max-length 8 --interval 3 --validation 4 --pool 8 --test 6 --train-blocks 40 "
    "--epochs 2 --evaluate-every 4 --device cpu"
)
CELL = "numbers-tiny-lora-r2-lr1e-05-i3-v4-seed0"
STEPS = 20


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs the command on a tiny model and task; more options replace those above."""
    documents = [" ".join(str((n * k) % 7 + 1) for k in range(1, 9)) for n in range(1, 200)]
    run = tiny_command(monkeypatch, OPTIONS, documents)
    return lambda more="", output=tmp_path: run(["--output-dir", str(output), *more.split()])


def untimed(folder):
    """The lines of a run's log, and its summary, without what depends on the machine's speed."""
    lines = [*read_log(folder / "log.jsonl"), json.loads((folder / "result.json").read_text())]
    return [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines]


def lines_of(folder, kind):
    return [line for line in read_log(folder / "log.jsonl") if line["kind"] == kind]


def test_each_method_trains_until_it_is_where_the_baseline_ended(command, tmp_path):
    result = command("--methods bracket,reference")
    assert result.exit_code == 0, result.output
    assert result.loads == 1
    cell = tmp_path / CELL
    baseline = json.loads((cell / "adamw" / "result.json").read_text())
    assert (baseline["steps"], baseline["trials"], baseline["reached"]) == (STEPS, 0, None)
    steps = lines_of(cell / "adamw", "step")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [line["step"] for line in lines_of(cell / "adamw", "evaluation")] == [
        0,
        *range(4, 21, 4),
    ]

    fast = json.loads((cell / "bracket" / "result.json").read_text())
    assert fast["target"] == baseline["test_loss"]
    assert fast["reached"]
    evaluations = lines_of(cell / "bracket", "evaluation")
    assert fast["test_loss"] == evaluations[-1]["test_loss"] <= baseline["test_loss"] + 1e-4
    assert all(line["test_loss"] > baseline["test_loss"] + 1e-4 for line in evaluations[:-1])
    assert fast["steps"] < STEPS
    stages = lines_of(cell / "bracket", "stage")
    assert fast["stages"] == len(stages) > 0
    assert fast["trials"] == sum(stage["passes"] for stage in stages)
    assert not (cell / "bracket" / "checkpoint.pt").exists()


def test_the_costs_are_counted_in_both_ways_and_so_is_what_was_saved(command, tmp_path):
    command("--methods bracket")
    cell = tmp_path / CELL
    used = {}
    for name in ("adamw", "bracket"):
        run = json.loads((cell / name / "result.json").read_text())
        costs, steps, trials = run["costs"], run["steps"], run["trials"]
        numbers = sum(p.numel() for p in with_lora(tiny_llama(), rank=2).parameters())
        numbers -= sum(p.numel() for p in tiny_llama().parameters())
        more = numbers * (UPDATE * steps + WRITE * trials)
        used[name] = costs["step"] * steps + costs["trial"] * trials + more
        assert run["flops"] == used[name]
        papers = PAPERS_STEP * costs["forward"] * steps + costs["trial"] * trials
        assert run["flops_paper"] == papers + more
        assert costs["step"] < PAPERS_STEP * costs["forward"]
        assert run["seconds_with_tests"] > run["seconds"] > 0
    row = (tmp_path / "table.md").read_text().splitlines()[3]
    assert "| bracket | 1 |" in row
    assert f"| 1 of 1 | {100 - 100 * used['bracket'] / used['adamw']:.1f} % |" in row


def test_the_report_is_redrawn_from_the_files(command, tmp_path):
    command("--methods bracket")
    figures = ("cost-used.png", "cost-saved.png", "loss-curves.png", "tau.png")
    table = (tmp_path / "table.md").read_text()
    for name in (*figures, "table.md"):
        assert (tmp_path / name).stat().st_size > (10_000 if name.endswith("png") else 100)
        (tmp_path / name).unlink()
    again = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "table.md").read_text() == table
    assert all((tmp_path / name).exists() for name in figures)


def test_a_killed_run_goes_on_bit_for_bit(command, tmp_path, monkeypatch):
    """With dropout, whose random numbers go on too, and several batches a step."""
    more = "--methods calibrated --lora-dropout 0.1 --batch-size 2 --accumulation-steps 2"
    more += " --until-idle --lr 0.01"
    command(more, tmp_path / "whole")
    cell = f"{CELL.replace('-seed0', '-idle-seed0').replace('1e-05', '0.01')}/calibrated"
    whole = untimed(tmp_path / "whole" / cell)

    train = protocol.Run.train
    for stop in (2, 5, 6):  # before the first checkpoint, between two, and once more

        def killed(run, progress, stop=stop):
            def die(steps, loss):
                if run.result.method == "calibrated" and steps == stop:
                    raise KeyboardInterrupt
                progress(steps, loss)

            return train(run, die)

        monkeypatch.setattr(protocol.Run, "train", killed)
        result = command(f"{more} --resume", tmp_path / "killed")
        assert result.exit_code == 130
        assert "--resume to continue from the last checkpoint" in result.output
    monkeypatch.setattr(protocol.Run, "train", train)
    assert command(f"{more} --resume", tmp_path / "killed").exit_code == 0
    assert untimed(tmp_path / "killed" / cell) == whole


def test_finished_runs_are_kept_and_other_settings_are_refused(command, tmp_path):
    command("--no-fast-forward")
    assert not (tmp_path / CELL / "bracket").exists()
    again = command("--no-fast-forward --resume")
    assert (again.exit_code, again.loads) == (0, 1), "not even the model is loaded"
    assert "pass --resume" in str(command("--no-fast-forward").exception)
    other = str(command("--epochs 3 --resume").exception)
    assert "--epochs 2.0 instead of 3.0" in other
    assert "Choose another --output-dir" in other


def test_a_run_until_nothing_is_found_ends_after_three_idle_stages(command, tmp_path):
    command("--methods bracket --until-idle --epochs 40 --lr 0.02")
    run = tmp_path / CELL.replace("-seed0", "-idle-seed0").replace("1e-05", "0.02") / "bracket"
    found = [stage["tau"] != 0 for stage in lines_of(run, "stage")]
    assert json.loads((run / "result.json").read_text())["steps"] < 400
    assert found[-3:] == [False] * 3
    assert not any(found[i : i + 3] == [False] * 3 for i in range(len(found) - 3))


def test_studies_vary_one_thing_and_are_told_apart_in_the_table(command, tmp_path):
    assert command("--study dora --methods bracket").exit_code == 0
    assert command("--study full --methods bracket --resume").exit_code == 0
    folders = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert folders == sorted(
        CELL.replace("lora-r2", adapter) for adapter in ("lora-r2", "dora-r2", "full")
    )
    table = (tmp_path / "table.md").read_text()
    assert all(f"| {adapter} |" in table for adapter in ("LoRA 2", "DoRA 2", "full"))
    trained = json.loads((tmp_path / folders[1] / "adamw" / "result.json").read_text())
    assert trained["costs"]["step"] > 2.9 * trained["costs"]["forward"], "all weights are trained"


def test_accumulated_batches_weigh_each_token_as_one_large_batch_does():
    """The blocks have different numbers of labels."""
    gradients = []
    for size, accumulation in ((8, 1), (2, 4)):
        setting = Setting(size, 1, accumulation=accumulation, validation=6, count_flops=False)
        comparison = Comparison(tiny_lora(), random_splits(), setting)
        batches = comparison.training_batches()
        taken = [next(batches) for _ in range(accumulation)]
        loss = comparison.backward(taken)
        gradients.append([loss, *(p.grad.clone() for p in comparison.parameters)])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--task numbers,nonsense", "expected one of"),
        ("--pool 6", "must be a multiple of --validation (4)"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(command, more, words):
    result = command(more)
    assert_refused(result, words)


def test_a_baseline_that_diverged_is_one_line_and_can_be_reported_on(command, tmp_path):
    text = str(command("--lr 1e30 --methods bracket").exception)
    assert text == "adamw diverged at --lr 1e+30: lower it"
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "| adamw | 1 | nan |" in (tmp_path / "table.md").read_text()


def test_the_papers_preset_is_the_authors_setting():
    c = paper.Configuration(**paper.PRESETS["paper"])
    assert (c.batch_size * c.accumulation_steps, c.tokenizer_max_length, c.epochs) == (512, 1024, 5)
    assert (c.lora_rank, c.lora_alpha, c.lora_dropout, c.lr) == (64, 16, 0.1, 2e-5)
    assert (c.interval, c.validation, c.source) == (6, 32, "hub")


def test_runs_of_several_seeds_are_averaged(command, tmp_path):
    for seed in (0, 1):
        command(f"--methods bracket --seed {seed}")
    cells = paper_report.read(tmp_path)
    table = paper_report.means(paper_report.frame(cells))
    assert list(table["seeds"]) == [2, 2]
    losses = [cell.summary["test_loss"] for cell in cells if cell.summary["method"] == "bracket"]
    assert table["test_loss"][1] == pytest.approx(sum(losses) / 2)
    shutil.rmtree(tmp_path / CELL.replace("seed0", "seed1") / "adamw")
    kept = paper_report.frame(paper_report.read(tmp_path))
    assert kept["used_flops"].isna().sum() == 1, "nothing to compare it with"
