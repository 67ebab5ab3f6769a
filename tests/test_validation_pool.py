"""``batches_per_stage``: other examples of a pool at each stage."""

import pytest
import torch

from fastforward_optim import FastForward, ValidationLoss, lora_parameters

from .conftest import fixed, token_batch


def pool(count, size=2):
    return [token_batch(size, 9, seed=seed) for seed in range(count)]


def test_each_stage_measures_the_next_batches_of_the_pool_in_turn(lora_model):
    batches = pool(5)
    val_fn = ValidationLoss(lora_model, batches, batches_per_stage=2)
    expected = [[0, 1], [0, 1], [2, 3], [4, 0], [1, 2]]
    for stage, chosen in enumerate(expected):
        if stage:
            val_fn.new_stage()
        loss = ValidationLoss(lora_model, [batches[index] for index in chosen])()
        assert val_fn() == val_fn() == pytest.approx(loss, rel=1e-6)
    assert repr(val_fn) == "ValidationLoss(PeftModelForCausalLM, 5 batches, 2 a stage)"


def test_the_place_in_the_pool_is_part_of_the_checkpoint(lora_model):
    def make():
        val_fn = ValidationLoss(lora_model, pool(3), batches_per_stage=1)
        adamw = torch.optim.AdamW(lora_parameters(lora_model), lr=1e-4)
        return val_fn, FastForward(adamw, val_fn, **fixed(1))

    val_fn, optimizer = make()
    for _ in range(2):
        lora_model(**token_batch(2, 9)).loss.backward()
        optimizer.step()
    restored, fresh = make()
    assert restored() != val_fn()
    fresh.load_state_dict(optimizer.state_dict())
    assert restored() == val_fn()
    restored.new_stage()
    val_fn.new_stage()
    assert restored() == val_fn()


@pytest.mark.parametrize(
    ("count", "error", "words"),
    [
        (0, ValueError, r"batches_per_stage must be at least 1 \(a number of batches\), got 0"),
        (1.5, TypeError, "batches_per_stage must be an integer"),
        (4, ValueError, "batches_per_stage is 4, but there are only 3 batches"),
    ],
)
def test_a_stage_cannot_measure_more_than_there_is(lora_model, count, error, words):
    with pytest.raises(error, match=words):
        ValidationLoss(lora_model, pool(3), batches_per_stage=count)


def test_a_stage_without_any_label_is_named(lora_model):
    batches = pool(2)
    batches[1]["labels"][:] = -100
    val_fn = ValidationLoss(lora_model, batches, batches_per_stage=1)
    val_fn.new_stage()
    val_fn()
    val_fn.new_stage()
    with pytest.raises(ValueError, match="nothing in this stage's 1 of the batches counts"):
        val_fn()
