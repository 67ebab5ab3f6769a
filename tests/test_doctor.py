"""``python -m fastforward_optim doctor`` reports what is installed and whether it works."""

import configparser
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastforward_optim
from fastforward_optim import doctor
from fastforward_optim.__main__ import main

ROOT = Path(__file__).parent.parent


def run(*words, path=""):
    return subprocess.run(
        [sys.executable, "-m", "fastforward_optim", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )


def test_what_is_installed_works(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line == line.rstrip() for line in lines)
    words = [line.split() for line in lines]
    assert any(line[:1] == ["torch:"] and torch.__version__ in line[1] for line in words)
    for device in doctor.devices():
        assert any(line[:4] == ["stage", "on", f"{device}:", "ok,"] for line in words)
    assert ["integrations.transformers:", "ok"] in words


def test_what_is_missing_is_no_failure_and_named_with_its_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "PACKAGES", {**doctor.PACKAGES, "not_there": "peft"})
    (tmp_path / "not_there").mkdir()  # a folder is no package
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["not_there"] == "not installed: pip install 'fastforward-optim[peft]'"


def test_a_broken_package_is_a_failure_and_what_needs_it_is_not_tried(tmp_path):
    noise = "import logging, sys; print('hello'); print('no', file=sys.stderr); logging.error('no')"
    for name in ("lightning", "trl", "bitsandbytes"):
        (tmp_path / f"{name}.py").write_text(noise)  # quick to import
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise OSError('no library\\nmore')")
    result = run("doctor", "--json", path=tmp_path)
    assert (result.returncode, result.stderr) == (1, "")
    found = json.loads(result.stdout)
    assert found["transformers"] == "failed: OSError: no library"
    assert found["integrations.transformers"] == "not tried: needs transformers"
    assert found["stage on cpu"].startswith("ok")


@pytest.mark.parametrize(("change", "failed"), [(1e-3, True), (0.0, False)])
def test_a_stage_that_leaves_other_weights_is_found_out(monkeypatch, change, failed):
    real = doctor.FastForward.step

    def step(self, closure=None):
        real(self, closure)
        self.param_groups[0]["params"][0].data.add_(change)

    monkeypatch.setattr(doctor.FastForward, "step", step)
    if failed:
        with pytest.raises(RuntimeError, match="left other weights than it measured"):
            doctor.run_stage("cpu")
    else:
        doctor.run_stage("cpu")


def test_the_extras_it_names_bring_what_it_names():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    for package, extra in doctor.PACKAGES.items():
        assert not extra or package in extras[extra]


def test_it_tells_its_version_and_its_commands(capsys):
    with pytest.raises(SystemExit) as ending:
        main(["--version"])
    assert ending.value.code == 0
    assert main([]) == 0
    assert capsys.readouterr().out.startswith(f"fastforward_optim {fastforward_optim.__version__}")


def test_it_imports_nothing_optional_until_it_is_asked():
    code = (
        "import sys, fastforward_optim.__main__, fastforward_optim.doctor as d;"
        "print([name for name in d.PACKAGES if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
