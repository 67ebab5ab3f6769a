"""A run of a few hundred steps shows no growth and no drift, and what would is found."""

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.measurements import longrun
from fastforward_optim.stage.stage import Stage

from .conftest import DEVICES

CPU = torch.device("cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_the_command_finds_nothing_wrong_and_keeps_its_figures(device, tmp_path):
    words = ["longrun", "--steps", "300", "--device", device, "--output", str(tmp_path)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "300 steps, a stage after every 6" in result.output
    kept = json.loads((tmp_path / f"{device}-300.json").read_text())
    figures = {row["what"]: row["value"] for row in kept["rows"]}
    assert {"device", "versions"} <= kept["about"].keys()
    for name in ("rolled back", "committed", "calibrated"):
        assert figures[f"{name}: stages"] == 50
        assert figures[f"{name}: tensors, growth after the first tenth"] == 0
        assert 500 < figures[f"{name}: history, per stage"] < 5000
    assert figures["committed: stages that moved the weights"] > 10
    assert 0 < figures["committed: largest error / rounding allowed"] <= 1


def test_a_stage_that_leaves_a_trace_is_found(monkeypatch):
    real = Stage.write

    def write(self, tau):
        real(self, tau)
        if tau == 0:
            with torch.no_grad():
                self._tensors[0].view(-1)[0].add_(1e-6)

    monkeypatch.setattr(Stage, "write", write)
    rows, held = longrun.report(CPU, 100, 6)
    assert rows[0]["value"] == 0
    assert not held
