"""The history can be read as a sequence, a table, JSON lines, a picture and a few words."""

import dataclasses
import json
import math

import pytest
import torch

from fastforward_optim import FastForward, History, StageRecord

from .conftest import LOWEST, Regression, fixed

CALIBRATED = [
    StageRecord(6, 300.0, ((0.0, 3.0), (300.0, 2.0)), 3.0, 2.0, 0.5, steps=6, lr_scale=200.0),
    StageRecord(
        18, 0.0, ((0.0, 2.0), (3.0, 2.1), (-3.0, 1.9)), 2.0, 1.8, 0.5,
        steps=12, mean_loss=1.8, averaged=True, lr_scale=180.0,
    ),
]  # fmt: skip
RECORDS = [
    StageRecord(6, 4.0, ((0.0, 2.0), (4.0, 1.5), (8.0, math.inf)), 2.0, 1.5, 0.25),
    StageRecord(12, 0.0, ((0.0, 1.4), (1.0, math.nan)), 1.4, 1.4, 0.5),
]


@pytest.fixture
def history():
    return History(RECORDS)


@pytest.fixture
def real_history():
    problem = Regression()
    optimizer = FastForward(
        torch.optim.AdamW(problem.parameters, lr=1e-3),
        problem.val_loss,
        line_search=LOWEST,
        **fixed(3),
    )
    problem.train(optimizer, 30)
    return optimizer.history


def test_it_is_a_sequence(history):
    assert len(history) == 2
    assert list(history) == RECORDS
    assert history[-1] == RECORDS[1]
    assert list(history[1:]) == RECORDS[1:]
    assert RECORDS[0] in history
    assert history == History(RECORDS)
    assert history != History()
    assert not History()


def test_the_table_has_one_row_a_stage(real_history):
    frame = real_history.to_dataframe()
    assert list(frame.columns) == [
        "step", "tau", "trials", "loss_before", "loss_after", "seconds",
        "steps", "mean_loss", "averaged", "lr_scale", "kind", "decision", "error", "elsewhere",
    ]  # fmt: skip
    assert frame["step"].tolist() == list(range(3, 31, 3))
    assert (frame["loss_after"] <= frame["loss_before"]).all()
    assert (frame["seconds"] > 0).all()
    assert list(History().to_dataframe().columns) == list(frame.columns)


def test_json_lines_are_valid_json_also_where_a_loss_was_not_finite(history, tmp_path):
    path = tmp_path / "stages.jsonl"
    history.to_jsonl(path)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    of_calibration = {"steps": 1, "mean_loss": None, "averaged": False, "lr_scale": 1.0}
    words = {"kind": "stage", "decision": "", "error": None, "elsewhere": 0}
    assert lines == [
        of_calibration
        | words
        | {
            "step": 6,
            "tau": 4.0,
            "trials": [[0.0, 2.0], [4.0, 1.5], [8.0, None]],
            "loss_before": 2.0,
            "loss_after": 1.5,
            "seconds": 0.25,
        },
        of_calibration
        | words
        | {
            "step": 12,
            "tau": 0.0,
            "trials": [[0.0, 1.4], [1.0, None]],
            "loss_before": 1.4,
            "loss_after": 1.4,
            "seconds": 0.5,
        },
    ]


def test_the_plot_shows_tau_and_loss_over_steps_with_labels(real_history, tmp_path):
    figure = real_history.plot()
    upper, lower = figure.axes
    assert "tau" in upper.get_ylabel()
    assert "loss" in lower.get_ylabel()
    assert "steps" in lower.get_xlabel()
    bars = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in upper.patches}
    assert bars == pytest.approx({record.step: record.tau for record in real_history})
    lines = {line.get_label(): list(line.get_ydata()) for line in lower.lines}
    assert lines["before the stage"] == [record.loss_before for record in real_history]
    assert lines["after the stage"] == [record.loss_after for record in real_history]
    figure.savefig(tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 5000


@pytest.mark.parametrize("records", [[], RECORDS[:1]], ids=["none", "one"])
def test_a_short_history_can_be_plotted_too(records, tmp_path):
    History(records).plot().savefig(tmp_path / "history.png")


def test_the_summary_says_what_came_of_it(history):
    assert str(history).splitlines() == [
        "Fast Forward: 2 stages up to step 12, 1 of them useful",
        "  trials: 5 (2.5 a stage), 0.8 s in all",
        "  validation loss: 2.0000 before the first stage, 1.4000 after the last",
        "  tau of the useful ones: 4 to 4, median 4",
    ]
    assert str(History()) == "Fast Forward: no stage yet"
    assert str(History(RECORDS[1:])).startswith("Fast Forward: 1 stage up to step 12, 0 of")


def test_a_state_dict_holds_no_times_and_the_summary_counts_those_of_this_process(history):
    assert all("seconds" not in record for record in history.state_dict())
    restored = History(map(StageRecord.from_dict, history.state_dict()))
    assert all(math.isnan(record.seconds) for record in restored)
    resumed = History([restored[0], RECORDS[1]])
    assert "5 (2.5 a stage), 0.5 s in this process" in str(resumed)
    assert resumed.to_dataframe()["seconds"].sum() == 0.5
    # Losses that are NaN are the same ones here, as numbers that were loaded are not.
    first, again = RECORDS[0], StageRecord.from_dict(RECORDS[0].to_dict() | {"seconds": 9.0})
    assert first.trials[:2] == again.trials[:2]
    assert dataclasses.replace(again, trials=first.trials) == first


def test_a_calibrated_history_survives_its_dict_counts_the_mean_and_says_so(tmp_path):
    history = History(CALIBRATED)
    assert [StageRecord.from_dict(record) for record in history.state_dict()] == CALIBRATED
    assert [record.passes for record in history] == [2, 4]
    assert [record.useful for record in history] == [True, True]
    assert str(history).splitlines()[1:] == [
        "  trials: 6 (3.0 a stage), 1.0 s in all",
        "  validation loss: 3.0000 before the first stage, 1.8000 after the last",
        "  tau of the useful ones: 300 to 300, median 300",
        "  left at the mean of the iterates: 1 stage",
        "  learning rate: now 180 times the one set",
    ]
    figure = history.plot()
    assert [axes.get_ylabel().split("\n")[0] for axes in figure.axes] == [
        "tau (repeats of",
        "validation loss",
        "learning rate",
    ]
    upper, _, rate = figure.axes
    assert marks(upper) == {"left at the mean of the iterates": [18]}
    [line] = rate.lines
    assert list(line.get_xdata()) == [0, 6, 18]
    assert list(line.get_ydata()) == [1.0, 200.0, 180.0]
    figure.savefig(tmp_path / "history.png")


def marks(axes):
    """Labels of the marks in a panel, and the steps that have one."""
    return {line.get_label(): list(line.get_xdata()) for line in axes.lines}


def test_the_plot_marks_the_stages_that_found_nothing_and_counts_the_useful_ones(history):
    upper, _ = history.plot().axes
    assert marks(upper) == {"nothing found": [12]}
    assert upper.get_title(loc="left") == "Fast Forward: 2 stages, 1 useful"


def test_the_plot_tells_checks_of_a_calibration_from_stages_that_found_nothing(history):
    sound = dataclasses.replace(history[1], kind="check", step=20)
    upper, _ = History([*history, sound]).plot().axes
    assert marks(upper) == {"nothing found": [12], "checked: sound": [20]}


def test_numbers_at_the_axes_are_plain_and_a_narrow_range_has_some(tmp_path):
    [record, _] = CALIBRATED
    history = History([dataclasses.replace(record, lr_scale=scale) for scale in (2.0, 4.0)])
    for drawn in (History(CALIBRATED), history):
        figure = drawn.plot()
        figure.savefig(tmp_path / "history.png")
        tau, _, rate = figure.axes
        assert {"1", "10", "100"} <= {label.get_text() for label in tau.get_yticklabels()}
        low, high = rate.get_ylim()
        labels = [*rate.get_yticklabels(), *rate.get_yticklabels(minor=True)]
        shown = [x for x in labels if x.get_text() and low <= x.get_position()[1] <= high]
        assert len(shown) >= 2
        assert not any("$" in label.get_text() for label in shown)


def test_a_record_from_before_calibration_can_be_read():
    old = {name: value for name, value in RECORDS[0].to_dict().items() if name in OLD_FIELDS}
    assert StageRecord.from_dict(old) == RECORDS[0]
    with pytest.raises(ValueError, match="needs exactly"):
        StageRecord.from_dict(old | {"more": 1})


OLD_FIELDS = {"step", "tau", "trials", "loss_before", "loss_after", "seconds"}
