"""The benchmarks compare fairly, and the demo runs on the real model."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.runner import Comparison, Method, Setting
from benchmarks.tasks import MEDICAL, Splits, Task, split_and_pack
from fastforward_optim import BracketSearch, RepeatSearch

from .conftest import tiny_lora

SETTING = Setting(batch_size=4, budget_steps=30, interval=3, evaluations=5)


def random_splits():
    tokens = torch.randint(0, 97, (60, 10), generator=torch.Generator().manual_seed(0))
    return Splits(train=tokens[:40], validation=tokens[40:46], test=tokens[46:])


@pytest.fixture
def comparison():
    return Comparison(tiny_lora(), random_splits(), SETTING)


def run(comparison, method):
    parts = []
    result = comparison.run(method, lambda part, loss: parts.append(part))
    assert sum(parts) == pytest.approx(result.flops / (30 * comparison.costs.step))
    return result


METHODS = [
    Method("plain", 1e-3),
    Method("repeat", 1e-4, RepeatSearch()),
    Method("bracket", 1e-4, BracketSearch()),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_every_method_spends_the_budget_and_no_more(comparison, method):
    result = run(comparison, method)
    costs = comparison.costs
    assert result.flops == result.steps * costs.step + result.trials * costs.trial
    budget = 30 * costs.step
    assert budget - costs.step < result.flops <= budget
    assert (result.trials > 0) == (method.line_search is not None)
    assert result.curve[0] == (0, comparison.initial_test_loss)
    assert result.curve[-1][0] == result.flops
    assert result.test_loss == comparison.test() != comparison.initial_test_loss


def test_a_trial_is_charged_as_the_forwards_that_it_makes(comparison):
    """On this model a step costs a little more than two forwards of its batch of 4."""
    forward_of_four = comparison.costs.trial * 4 / 6
    assert comparison.costs.step / forward_of_four == pytest.approx(2.1, abs=0.15)


def test_every_run_starts_from_the_same_adapter_and_sees_the_same_batches(comparison):
    seen = []
    handle = comparison.model.register_forward_pre_hook(
        lambda model, args, kwargs: (
            seen.append(kwargs["input_ids"].clone()) if model.training else None
        ),
        with_kwargs=True,
    )
    results, batches = [], []
    for method in (METHODS[0], METHODS[2], METHODS[0]):
        results.append(run(comparison, method))
        batches.append(torch.cat(seen))
        seen.clear()
    handle.remove()
    assert replace(results[0], seconds=0) == replace(results[2], seconds=0)
    shared = min(map(len, batches))
    assert torch.equal(batches[0][:shared], batches[1][:shared])


class Words:
    """A tokenizer of words, enough of one for packing."""

    eos_token_id = 0

    def __call__(self, documents, add_special_tokens):
        return {"input_ids": [[int(word) for word in text.split()] for text in documents]}


def test_no_document_is_in_two_splits():
    documents = [" ".join([str(number)] * (3 + number % 5)) for number in range(1, 400)]
    task = Task("numbers", lambda: documents, "")
    splits = split_and_pack(task, Words(), block=8, validation=5, test=7, seed=1)
    assert splits.validation.shape == (5, 8)
    assert splits.test.shape == (7, 8)
    assert len(splits.train) > 100
    found = [set(split.unique().tolist()) - {0} for split in splits]
    for first in range(3):
        for second in range(first):
            assert not found[first] & found[second]
    again = split_and_pack(task, Words(), block=8, validation=5, test=7, seed=1)
    assert all(map(torch.equal, splits, again))


def test_a_task_that_is_too_small_says_so():
    with pytest.raises(SystemExit, match="numbers task is too small for 7 blocks of 8 tokens"):
        split_and_pack(Task("numbers", lambda: ["1 2 3"], ""), Words(), block=8, test=7)


def test_the_medical_task_is_real_text():
    documents = MEDICAL.documents()
    assert len(documents) > 10_000
    assert any(text.startswith("Arachnodactyly: ") for text in documents)
    assert not any("\\" in text or "[PMID" in text for text in documents)


def test_the_demo_runs_on_the_real_model_and_writes_what_it_found(tmp_path):
    options = "--budget-steps 6 --interval 2 --batch-size 2 --block 8 --validation 2 --test 2"
    result = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks", "demo", *options.split()),
            *("--rank", "2", "--device", "cpu", "--output", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "6/6 Fast Forward, lr 0.003" in result.stderr, "progress bars"
    document = json.loads((tmp_path / "results.json").read_text())
    assert [(r["method"], r["lr"]) for r in document["results"]] == [
        (method, lr) for lr in (2e-5, 3e-3) for method in ("AdamW", "paper's rule", "Fast Forward")
    ]
    assert {"date", "device", "versions", "command", "task"} <= set(document["about"])
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 2 + 6
    for text in (result.stdout, table[2]):
        assert "AdamW" in text
        assert "2e-05" in text
    assert (tmp_path / "loss.png").stat().st_size > 10_000
