"""Every Python block of the README runs, in order, in one session on a small real model."""

import re

from fastforward_optim import FastForward

from .documents import ROOT, blocks, missing_commands, missing_extras, run, session

PATH = ROOT / "README.md"
README = PATH.read_text()


def test_the_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = session(tmp_path)

    def check(block, number):
        history = getattr(names["optimizer"], "history", [])
        if number == 0:
            assert [stage.kind for stage in history] == ["probe", "check", "finish"]
            assert [stage.step for stage in history] == [6, 12, 12]
        if "optimizer.lr_scale" in block:
            scale, summary = capsys.readouterr().out.split("\n", 1)
            assert float(scale) == history[-1].lr_scale != 1
            assert "3 stages up to step 12" in summary
        if "Trainer(" in block:
            log = names["trainer"].state.log_history
            logged = [entry["step"] for entry in log if "fast_forward/tau" in entry]
            assert logged == [6, 12, 12]  # probe, check and finish

    assert len(blocks(PATH)) >= 3
    run(PATH, names, check)
    assert isinstance(names["optimizer"], FastForward)


def test_the_example_that_leads_is_ten_lines():
    lines = [line for line in blocks(PATH)[0].splitlines() if line.strip()]
    assert len(lines) <= 12


def test_the_commands_exist():
    commands = "\n".join(blocks(PATH, "bash"))
    assert "make test" in commands
    assert list(missing_commands(commands)) == []
    assert list(missing_extras(README)) == []


def test_files_it_points_to_exist():
    for target in re.findall(r"\]\(([\w./-]+\.(?:md|cff|png|py))\)", README):
        assert (ROOT / target).is_file(), target


def test_makefile_and_constraints_pin_the_same_torch():
    pinned = re.search(r"^TORCH := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert pinned in (ROOT / "constraints.txt").read_text().splitlines()
