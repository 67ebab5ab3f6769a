"""``python -m fastforward_optim doctor`` tries what is installed and says what to do."""

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
EXTRAS = {
    "peft": "peft>=0.15",
    "transformers": "transformers>=5.0",
    "bench": "peft>=0.21",
}


def distribution(folder, name, version, *required):
    """What pip leaves of an installed distribution, its files aside."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in required)]
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", *lines, ""]))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """As if this package had been installed with pip."""
    required = [f"{need} ; extra == '{extra}'" for extra, need in EXTRAS.items()]
    version = fastforward_optim.__version__
    distribution(tmp_path, "fastforward-optim", version, "torch>=2.11", *required)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(*words, path=""):
    return subprocess.run(
        [sys.executable, "-m", "fastforward_optim", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(path)},
        capture_output=True,
        text=True,
    )


def test_what_is_installed_works(installed, capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "  all that is installed works"
    assert "Notes" not in lines
    assert all(line == line.rstrip() for line in lines)
    words = [line.split() for line in lines]
    assert ["torch", torch.__version__, ">=2.11", "ok", "for", "everything"] in words
    for device in doctor.devices():
        assert any(line[:4] == ["stage", "on", device, "ok"] for line in words)
        assert any(line[:5] == ["LoRA", "stage", "on", device, "ok"] for line in words)
    assert ["integrations.transformers", "ok"] in words


def test_the_lowest_of_the_extras_counts(installed):
    assert doctor.lowest_versions() == {"torch": "2.11", "peft": "0.15", "transformers": "5.0"}


def test_an_old_version_is_a_problem_and_so_said_once(installed, capsys):
    distribution(installed, "peft", "0.14.0")
    assert main(["doctor", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [
        "peft: 0.14.0 is older than 0.15, the lowest supported: "
        "pip install -U 'fastforward-optim[peft]'"
    ]


def test_a_version_of_more_digits_is_not_older(installed, capsys):
    distribution(installed, "peft", "0.100.0+local")
    distribution(installed, "transformers", "5.0.0.dev0")
    assert main(["doctor"]) == 0


def test_a_checkout_says_that_it_does_not_know_the_lowest_versions(monkeypatch):
    monkeypatch.setattr(doctor, "DISTRIBUTION", "fastforward-optim-elsewhere")
    report = doctor.examine()
    assert len(report.notes) == 1
    assert "lowest supported versions are not known" in report.notes[0]
    assert not report.problems


def test_what_is_missing_is_no_problem(installed, monkeypatch, capsys):
    known = doctor.PACKAGES
    absent = doctor.Package("not_there", "peft", "lora_parameters")
    monkeypatch.setattr(doctor, "PACKAGES", (*known, absent))
    (installed / "not_there").mkdir()  # a folder is no package
    assert main(["doctor"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "not_there" in line)
    assert line.endswith("for lora_parameters: pip install 'fastforward-optim[peft]'")


def test_a_broken_package_fails_with_what_to_do(tmp_path):
    """And what needs it is not tried. What the packages print and log is not shown."""
    noise = "import logging, sys; print('hello'); print('no', file=sys.stderr); logging.error('no')"
    for name in ("lightning", "trl", "bitsandbytes"):
        (tmp_path / f"{name}.py").write_text(noise)  # quick to import
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise OSError('no library\\nmore')")
    result = run("doctor", "--json", path=tmp_path)
    assert (result.returncode, result.stderr) == (1, "")
    report = json.loads(result.stdout)
    assert (
        "transformers: cannot be imported (OSError: no library): "
        "pip install --force-reinstall transformers"
    ) in report["problems"]
    states = {row["name"]: row["state"] for row in report["parts"]}
    assert states["stage on cpu"] == "ok"
    assert states["integrations.transformers"] == "not tried"


def test_a_part_of_ours_that_fails_is_to_be_reported(installed, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastforward_optim.integrations.transformers", None)
    report = doctor.examine()
    assert len(report.problems) == 1
    assert report.problems[0].startswith("integrations.transformers: fails (")
    assert "please report it" in report.problems[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.data.add_(1e-3), "weights left are not those of the lowest loss"),
        (lambda p: None, ""),
    ],
)
def test_a_stage_that_leaves_other_weights_is_found_out(monkeypatch, change, words):
    real = doctor.FastForward.step

    def step(self, closure=None):
        real(self, closure)
        change(self.param_groups[0]["params"][0])

    monkeypatch.setattr(doctor.FastForward, "step", step)
    row = doctor._try_stage("stage", "cpu", doctor._plain)
    assert (row.state, words in row.remedy) == ("broken" if words else "ok", True)


def test_the_extras_it_names_bring_what_it_names():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    for package in doctor.PACKAGES:
        if package.extra:
            assert package.name in extras[package.extra]


def test_version_help_and_no_optional_import():
    assert run("--version").stdout == f"fastforward_optim {fastforward_optim.__version__}\n"
    result = run()
    assert result.returncode == 0
    assert "doctor" in result.stdout
    code = (
        "import sys, fastforward_optim.__main__, fastforward_optim.doctor as d;"
        "print([p.name for p in d.PACKAGES if p.name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "['torch']\n"
