"""ValidationLoss is the loss of one big batch, however the examples are split."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from fastforward_optim import ValidationLoss

from .conftest import tiny_llama, tiny_lora, token_batch


def ragged_labels(batch, *, keep_first):
    """Mask a different number of labels in each row, as padding and prompts do."""
    labels = batch["labels"]
    for row in range(len(labels)):
        labels[row, 1 : 1 + row] = -100
    if not keep_first:
        labels[:, 0] = -100
    return batch


def rows(batch, start, stop):
    return {name: value[start:stop] for name, value in batch.items()}


def bert_config(**options):
    return BertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=0.5,
        **options,
    )


MODELS = {
    "causal": tiny_llama,
    "causal, LoRA": tiny_lora,
    "masked": lambda: BertForMaskedLM(bert_config()),
    "encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=97,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=1,
            num_heads=4,
            decoder_start_token_id=0,
        )
    ),
}


@pytest.mark.parametrize("keep_first", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_any_split_gives_the_loss_of_one_big_batch(name, keep_first):
    model = MODELS[name]()
    batch = ragged_labels(token_batch(8, 11), keep_first=keep_first)
    model.eval()
    with torch.no_grad():
        expected = model(**batch).loss.item()
    for split in ([8], [4, 4], [1, 7], [5, 1, 2], [1] * 8):
        ends = torch.tensor(split).cumsum(0).tolist()
        parts = [rows(batch, end - size, end) for size, end in zip(split, ends, strict=True)]
        assert ValidationLoss(model, parts)() == pytest.approx(expected, rel=1e-6)


def test_a_batch_in_which_no_label_counts_is_passed_over():
    model = tiny_llama()
    batch = token_batch(4, 6)
    empty = {**token_batch(2, 6, seed=3), "labels": torch.full((2, 6), -100)}
    first_only = token_batch(2, 6, seed=4)
    first_only["labels"][:, 1:] = -100
    alone = ValidationLoss(model, [batch])()
    assert ValidationLoss(model, [empty, batch, first_only])() == pytest.approx(alone, rel=1e-6)


def test_labels_of_sequences_count_by_sequence():
    model = BertForSequenceClassification(bert_config()).eval()
    batch = {
        "input_ids": token_batch(7, 5)["input_ids"],
        "labels": torch.tensor([0, 1, 1, 0, 1, 0, 0]),
    }
    with torch.no_grad():
        expected = model(**batch).loss.item()
    parts = [rows(batch, 0, 2), rows(batch, 2, 7)]
    assert ValidationLoss(model, parts)() == pytest.approx(expected, rel=1e-6)


def test_it_measures_in_eval_mode_and_puts_each_modules_mode_back():
    model = BertForMaskedLM(bert_config())
    batch = token_batch(4, 6)
    val_fn = ValidationLoss(model, [batch])
    model.train()
    model.bert.encoder.eval()  # frozen part, as some fine-tuning code has it
    modes = [module.training for module in model.modules()]
    first, second = val_fn(), val_fn()
    assert first == second, "no dropout"
    assert [module.training for module in model.modules()] == modes
    assert True in modes
    assert False in modes


def test_modules_that_merge_their_weights_in_eval_mode_can_be_measured():
    """As some implementations of LoRA do, in place; their trained tensors stay."""

    class Merging(nn.Linear):
        def train(self, mode=True):
            if mode != self.training:
                self.weight.data.add_(-1.0 if mode else 1.0)
                with torch.no_grad():
                    self.weight.add_(0.0)
            return super().train(mode)

    model = nn.Sequential(Merging(2, 2))
    before = model[0].weight.detach().clone()
    value = ValidationLoss(model, [1], forward=lambda m, b: (m[0].weight.sum(), 1))()
    assert value == pytest.approx(before.sum().item() + 4, rel=1e-5)
    assert torch.allclose(model[0].weight, before)


def test_no_gradients_are_made(lora_model):
    val_fn = ValidationLoss(
        lora_model,
        [token_batch(2, 5)],
        forward=lambda model, batch: (model(**batch).loss, 1),
    )
    assert isinstance(val_fn(), float)
    seen = []
    val_fn = ValidationLoss(
        lora_model, [1], forward=lambda m, b: (seen.append(torch.is_grad_enabled()) or 1.0, 1)
    )
    val_fn()
    assert seen == [False, False], "tried when it is made, and measured"


def test_a_forward_of_ones_own_is_weighted_by_what_it_returns():
    model = nn.Linear(3, 1)
    inputs = torch.randn(10, 3)

    def forward(model, batch):
        return model(batch[0]).square().mean(), len(batch[0])

    parts = [(inputs[:7], "anything"), (inputs[7:], "else")]
    expected = model(inputs).square().mean().item()
    assert ValidationLoss(model, parts, forward=forward)() == pytest.approx(expected, rel=1e-6)

    def tensors(model, batch):
        return model(batch[0]).square().mean(), torch.tensor(len(batch[0]))

    assert ValidationLoss(model, parts, forward=tensors)() == pytest.approx(expected, rel=1e-6)


def test_autocast_runs_the_forward_in_the_given_dtype(lora_model):
    batches = [token_batch(4, 9)]
    full = ValidationLoss(lora_model, batches)()
    half = ValidationLoss(lora_model, batches, autocast=torch.bfloat16)()
    assert half != full
    assert half == pytest.approx(full, rel=1e-2)


def test_batches_are_kept_on_the_models_device_and_follow_it():
    model = nn.Linear(2, 1)
    val_fn = ValidationLoss(model, [{"x": [torch.ones(1, 2)]}], forward=lambda m, b: (0.0, 1))
    assert val_fn.batches[0]["x"][0].device.type == "cpu"
    model.to("meta")
    seen = []
    val_fn.forward = lambda model, batch: (seen.append(batch["x"][0].device.type) or 0.0, 1)
    val_fn()
    assert seen == ["meta"]


# Bad input


def test_no_batches():
    with pytest.raises(ValueError, match=r"batches is empty.*at least one"):
        ValidationLoss(tiny_llama(), [])
    used_up = iter([token_batch(2, 3)])
    ValidationLoss(tiny_llama(), used_up)
    with pytest.raises(ValueError, match="iterator can be read only once"):
        ValidationLoss(tiny_llama(), used_up)


def test_no_label_counts():
    empty = {**token_batch(2, 6), "labels": torch.full((2, 6), -100)}
    with pytest.raises(ValueError, match="all labels in batches are -100"):
        ValidationLoss(tiny_llama(), [empty, empty])
    first_only = token_batch(2, 6)
    first_only["labels"][:, 1:] = -100
    with pytest.raises(ValueError, match="only first labels differ from -100"):
        ValidationLoss(tiny_llama(), [first_only, first_only])()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "llama"}, "model must be a torch.nn.Module, got str"),
        ({"batches": token_batch(2, 3)}, r"got one mapping; pass \[batch\]"),
        ({"batches": [torch.zeros(2, 3)]}, "batch must be a mapping .* got Tensor.*forward="),
        ({"batches": 5}, "batches must be an iterable of batches, got 5"),
        ({"autocast": "bfloat16"}, "autocast must be a torch.dtype .* got 'bfloat16'"),
        ({"forward": 3}, "forward must be a function .* got int"),
    ],
    ids=str,
)
def test_arguments_of_the_wrong_type(arguments, words):
    with pytest.raises(TypeError, match=words):
        ValidationLoss(**{"model": tiny_llama(), "batches": [token_batch(2, 3)], **arguments})


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (torch.tensor(1.0), r"forward must return \(loss, weight\).*got Tensor"),
        (3.0, r"forward must return \(loss, weight\).*got float"),
        ((torch.ones(3), 3), r"got a tensor of shape \(3,\); reduce it"),
    ],
    ids=str,
)
def test_a_forward_that_does_not_return_a_pair_of_numbers(result, words):
    with pytest.raises(TypeError, match=words):
        ValidationLoss(nn.Linear(2, 2), [1], forward=lambda model, batch: result)()


def test_every_label_of_a_regression_counts():
    model = BertForSequenceClassification(bert_config(num_labels=1)).eval()
    labels = torch.tensor([-100.0, -90, -100, 3, 4, 5, -100, 1])
    batch = {"input_ids": token_batch(8, 5)["input_ids"], "labels": labels}
    with torch.no_grad():
        expected = model(**batch).loss.item()
    parts = [rows(batch, 0, 3), rows(batch, 3, 8)]
    assert ValidationLoss(model, parts)() == pytest.approx(expected, rel=1e-6)


def test_a_model_with_a_loss_for_each_device():
    model = tiny_llama()
    model.register_forward_hook(lambda *_: SimpleNamespace(loss=torch.ones(2)))
    with pytest.raises(TypeError, match=r"the loss of LlamaForCausalLM has shape \(2,\), not one"):
        ValidationLoss(model, [token_batch(2, 8)])()


def test_weights_that_are_all_zero():
    with pytest.raises(ValueError, match="all weights that forward returned are zero"):
        ValidationLoss(nn.Linear(2, 2), [1], forward=lambda model, batch: (1.0, 0))()
