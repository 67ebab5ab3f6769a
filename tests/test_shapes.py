"""What is measured on models with random weights is what training would take."""

import json

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.comparison.flops import forward_flops, step_flops
from benchmarks.measurements import shapes, stage_cost
from benchmarks.measurements.fixed_stages import TRIALS
from benchmarks.models.adapters import with_lora
from benchmarks.models.shapes import SHAPES
from benchmarks.support.timing import WARM_UP

from .conftest import tiny_llama, token_batch
from .test_models import every_architecture

OPTIONS = {
    "device": torch.device("cpu"),
    "rank": 4,
    "batch_size": 4,
    "block": 16,
    "validation": 6,
    "dtype": torch.float32,
    "repeats": 3,
    "compile_layers": False,
}


def report(model, **options):
    rows = shapes.report("tiny", model=model, **OPTIONS | options)
    return {row["what"]: row["value"] for row in rows}


@every_architecture
@pytest.mark.parametrize("dora", [False, True])
def test_flops_are_those_of_the_model_itself(make, dora):
    figures = report(make(), dora=dora)
    model = with_lora(make(), rank=4, dora=dora)
    batch = token_batch(4, 16)
    forward, step = forward_flops(model, batch), step_flops(model, batch)
    assert figures["forward, counted"] == forward / 1e12
    assert figures["training step, counted"] == step / 1e12
    assert figures["training step / forward, counted"] == step / forward


def test_a_step_trains_a_batch_and_a_trial_measures_every_validation_block():
    model = tiny_llama()
    seen = {True: [], False: []}
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen[module.training].append(kwargs["input_ids"].shape),
        with_kwargs=True,
    )
    report(model)
    steps = WARM_UP + OPTIONS["repeats"]
    assert seen[True] == [(4, 16)] * (steps + 1), "and once for the gradients of the stages"
    trials = steps + TRIALS * steps
    # Before the first step a batch is tried, and then val_fn twice.
    assert seen[False] == [(4, 16)] + [(4, 16), (2, 16)] * (2 + trials)


@pytest.mark.parametrize(("dora", "kind"), [(False, "LoRA"), (True, "DoRA")])
def test_the_table_says_that_the_weights_are_random(capsys, monkeypatch, dora, kind):
    monkeypatch.setenv("COLUMNS", "200")
    rows = shapes.report("tiny", model=tiny_llama(), dora=dora, **OPTIONS)
    printed = capsys.readouterr().out
    assert f"tiny, random weights, {kind} rank 4, 4 x 16 tokens a step" in printed
    assert "6 x 16 a trial, float32" in printed
    for row in rows:
        assert row["what"] in printed


TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 97}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def test_true_shapes_are_built_where_no_model_is_given(monkeypatch):
    monkeypatch.setitem(SHAPES, "llama-3-8b", SHAPES["llama-3-8b"] | TINY)
    rows = shapes.report("llama-3-8b", **OPTIONS | {"dtype": torch.bfloat16})
    assert rows[0]["value"] > 0
    with pytest.raises(SystemExit, match="llama-4"):
        shapes.report("llama-4", **OPTIONS)


def test_the_command_prints_its_figures_and_keeps_them(monkeypatch, tmp_path):
    monkeypatch.setitem(SHAPES, "llama-3-8b", SHAPES["llama-3-8b"] | TINY)
    options = "--model llama-3-8b --rank 4 --batch-size 2 --block 8 --validation 2 --repeats 1"
    words = ["shapes", *options.split(), "--device", "cpu", "--output", str(tmp_path / "new")]
    result = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "llama-3-8b, random weights, LoRA rank 4" in result.output
    kept = json.loads((tmp_path / "new" / "llama-3-8b-lora-r4-b2-t8.json").read_text())
    assert {"device", "versions"} <= kept["about"].keys()
    assert all(row["value"] > 0 for row in kept["rows"] if "beyond" not in row["what"])
    assert CliRunner().invoke(app, ["shapes", "--model", "llama-4"]).exit_code == 2


def test_an_adapters_tensors_are_those_of_the_model_without_building_it():
    tensors = stage_cost.adapter("llama-3-8b", 8, torch.bfloat16, torch.device("cpu"))
    assert len(tensors) == 2 * 4 * 32  # A and B of four projections in each layer
    assert sum(tensor.numel() for tensor in tensors) == 13_631_488 // 2
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
