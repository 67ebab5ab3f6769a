"""Every Python block of the README runs, in order, in one session on a small real model."""

import re
from pathlib import Path

import pytest
from transformers import TrainingArguments

from fastforward_optim import FastForward

from .conftest import tiny_lora, token_batch

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def examples(count, seed):
    batch = token_batch(count, 9, seed=seed)
    return [{name: value[row] for name, value in batch.items()} for row in range(count)]


def test_the_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_lora()
    names = {
        "model": model,
        "val_batches": [token_batch(4, 9, seed=1), token_batch(2, 5, seed=2)],
        "pool": [token_batch(4, 9, seed=seed) for seed in (4, 5, 6)],
        "loader": [token_batch(4, 9, seed=3)] * 12,
        "steps": 12,
        "args": TrainingArguments(
            str(tmp_path), max_steps=12, report_to=[], use_cpu=True, disable_tqdm=True
        ),
        "train_set": examples(96, seed=5),
        "validation_set": examples(64, seed=6),
        "test_set": examples(8, seed=7),
    }
    assert len(BLOCKS) >= 5
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md, Python block {number + 1}", "exec"), names)
        if number == 0:
            first = names["optimizer"]
            assert [stage.step for stage in first.history] == [6, 12]
            assert "2 stages up to step 12" in capsys.readouterr().out
        if "optimizer.lr_scale" in block:
            history = names["optimizer"].history
            assert history[-1].step == 12
            assert float(capsys.readouterr().out) == history[-1].lr_scale != 1
        if "Trainer(" in block:
            log = names["trainer"].state.log_history
            assert [entry["step"] for entry in log if "fast_forward/tau" in entry] == [6, 12]
            capsys.readouterr()
    optimizer = names["optimizer"]
    assert isinstance(optimizer, FastForward)
    for _ in range(16):
        model(**token_batch(4, 9, seed=3)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert capsys.readouterr().out.startswith("step 16: tau ")


def test_the_example_that_leads_is_ten_lines():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 12


@pytest.mark.parametrize("command", re.findall(r"^make (\w+)", README, re.MULTILINE))
def test_the_commands_exist(command):
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert re.search(rf"^{command}:", makefile, re.MULTILINE)


def test_files_it_points_to_exist():
    for target in re.findall(r"\]\(([\w./]+\.(?:md|cff|png|py))\)", README):
        assert (Path(__file__).parent.parent / target).is_file(), target


def test_makefile_and_constraints_pin_the_same_torch():
    root = Path(__file__).parent.parent
    pinned = re.search(r"^TORCH := (.+)$", (root / "Makefile").read_text(), re.MULTILINE)[1]
    assert pinned in (root / "constraints.txt").read_text().splitlines()
