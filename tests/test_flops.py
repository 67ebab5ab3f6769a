"""FLOPs: counted and measured figures agree, and LoRA's step is two forwards."""

import pytest
import torch

from benchmarks.comparison.flops import forward_flops, step_flops

from .conftest import tiny_llama, tiny_lora, token_batch


@pytest.fixture
def batch():
    return token_batch(3, 20)


def test_the_forward_is_what_the_formula_says(batch):
    """Two per multiply-add: each matrix by each token, and q k^T and its product with v."""
    model = tiny_llama()
    config = model.config
    tokens, length, hidden = 3 * 20, 20, config.hidden_size
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name
    )
    attention = config.num_hidden_layers * tokens * length * 2 * hidden
    expected = 2 * (tokens * matrices + attention)
    assert attention > 0.05 * tokens * matrices
    # Some releases of transformers compute the rotary angles by a matrix product.
    assert forward_flops(model, batch) == pytest.approx(expected, rel=0.01)


def test_a_lora_step_is_about_two_forwards_and_full_fine_tuning_three(batch):
    assert 2.0 <= step_flops(tiny_lora(), batch) / forward_flops(tiny_lora(), batch) < 2.2
    full = tiny_llama()
    assert step_flops(full, batch) / forward_flops(full, batch) == pytest.approx(3, abs=0.05)


def test_counting_leaves_gradients_and_mode_alone(batch):
    model = tiny_lora().train()
    forward_flops(model, batch)
    step_flops(model, batch)
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert torch.is_grad_enabled()
