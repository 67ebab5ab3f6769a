"""``ValidationLoss.measure``: the loss of each row, of the forwards that give the loss."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from peft import PromptTuningConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    BertForSequenceClassification,
    BertForTokenClassification,
)

from fastforward_optim import ValidationLoss
from fastforward_optim.search.evidence import Paired, Rows
from fastforward_optim.validation import row_losses

from .conftest import tiny_llama, tiny_lora, token_batch
from .test_validation import MODELS, bert_config, ragged_labels, rows


def of_tokens(*, classes=97, keep_first=True):
    batch = ragged_labels(token_batch(6, 9), keep_first=keep_first)
    batch["labels"] = torch.where(batch["labels"] >= 0, batch["labels"] % classes, -100)
    return batch


def of_rows(labels):
    return {"input_ids": token_batch(len(labels), 5)["input_ids"], "labels": labels}


def classifier(**options):
    return BertForSequenceClassification(bert_config(**options))


def tuned(config, model=tiny_llama):
    torch.manual_seed(0)
    return get_peft_model(model(), config)


def sharpened(model):
    """Far from uniform, so that a wrong label or place would be seen."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def token_classifier():
    return BertForTokenClassification(bert_config(num_labels=5))


CASES = {
    "causal": (tiny_llama, of_tokens()),
    "LoRA": (tiny_lora, of_tokens()),
    "causal, no first label": (tiny_llama, of_tokens(keep_first=False)),
    "prompt tuning": (
        lambda: tuned(PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)),
        of_tokens(),
    ),
    "prompt tuning of both parts of an encoder-decoder": (
        lambda: tuned(
            PromptTuningConfig(task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=3),
            MODELS["encoder-decoder"],
        ),
        of_tokens(),
    ),
    "masked": (MODELS["masked"], of_tokens()),
    "token classifier": (token_classifier, of_tokens(classes=5)),
    "encoder-decoder": (MODELS["encoder-decoder"], of_tokens()),
    "classifier": (lambda: classifier(num_labels=3), of_rows(torch.tensor([0, 2, 1, 1, 0, 2]))),
    "classifier, a column of labels": (
        lambda: classifier(num_labels=3),
        of_rows(torch.tensor([[0], [2], [1], [1]])),
    ),
    "regression": (lambda: classifier(num_labels=1), of_rows(torch.tensor([-100.0, 3, 2, 5]))),
    "regression of three numbers": (
        lambda: classifier(num_labels=3, problem_type="regression"),
        of_rows(torch.randn(4, 3)),
    ),
    "several classes": (
        lambda: classifier(num_labels=3),
        of_rows(torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])),
    ),
}
by_case = pytest.mark.parametrize("name", CASES)


def case(name):
    make, batch = CASES[name]
    torch.manual_seed(0)
    return sharpened(make()), batch


def one_by_one(model, batch):
    """The slow twin: each row by itself, and the model's own mean times the labels counted."""
    measured = [
        ValidationLoss(model, [rows(batch, row, row + 1)]).weighted()
        for row in range(len(batch["labels"]))
    ]
    return Rows(tuple(loss * weight for loss, weight in measured), tuple(w for _, w in measured))


@by_case
def test_rows_are_what_the_model_gives_for_each_row_alone(name):
    model, batch = case(name)
    expected = one_by_one(model, batch)
    for parts in ([batch], [rows(batch, 0, 1), rows(batch, 1, len(batch["labels"]))]):
        found = ValidationLoss(model, parts).measure().rows
        assert found.weights == expected.weights
        assert found.sums == pytest.approx(expected.sums, rel=1e-4)


@by_case
def test_the_loss_is_the_models_own_to_the_last_bit(name):
    model, batch = case(name)
    val_fn = ValidationLoss(model, [batch])
    model.eval()
    with torch.no_grad():
        expected = model(**batch).loss.item()
    for _ in range(2):
        measured = val_fn.measure()
        assert measured.loss == val_fn() == expected
        assert measured[:2] == val_fn.weighted()


def test_a_row_without_labels_and_a_batch_without_are_no_units():
    model = tiny_llama()
    batch, empty = of_tokens(), token_batch(2, 5)
    batch["labels"][2] = -100
    empty["labels"][:] = -100
    found = ValidationLoss(model, [empty, batch]).measure().rows
    rest = {name: torch.cat([value[:2], value[3:]]) for name, value in batch.items()}
    expected = ValidationLoss(model, [rest]).measure().rows
    assert found.weights == expected.weights
    assert found.sums == pytest.approx(expected.sums, rel=1e-5)


@pytest.mark.parametrize("elements", [1, 2000])
def test_logits_in_parts_give_what_they_give_as_a_whole(elements, monkeypatch):
    model, batch = case("causal")
    whole = ValidationLoss(model, [batch]).measure()
    monkeypatch.setattr(row_losses, "_AT_ONCE", elements)
    assert ValidationLoss(model, [batch]).measure() == whole


def test_weights_in_bfloat16_give_rows_in_float32():
    model, batch = case("causal")
    model = model.bfloat16()
    found = ValidationLoss(model, [batch]).measure().rows
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits.double()
    losses = F.cross_entropy(
        logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none"
    )
    assert found.sums == pytest.approx(losses.sum(1).tolist(), rel=1e-5)


class Head(nn.Module):
    """A causal model whose loss is what a test makes of its logits and labels."""

    def __init__(self, loss):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.loss = sharpened(tiny_llama()), loss

    def forward(self, input_ids, labels):
        logits = self.inner(input_ids=input_ids).logits
        return SimpleNamespace(loss=self.loss(logits[:, :-1], labels[:, 1:]), logits=logits)


def mean(logits, labels, **options):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


OTHER_LOSSES = {
    "label smoothing": lambda x, y: mean(x, y, label_smoothing=0.1),
    "an auxiliary loss": lambda x, y: mean(x, y) + 1e-3 * x.square().mean(),
    "class weights": lambda x, y: mean(x, y, weight=torch.linspace(0.5, 2, 97)),
    "the mean over the rows": lambda x, y: torch.stack([*map(mean, x[:, None], y[:, None])]).mean(),
    "labels that are no classes": lambda x, y: mean(x, y.clamp(-100, 96)) * 1.01 + 0 * y.max(),
}


def assert_batches_are_units(val_fn, parts):
    alone = [ValidationLoss(val_fn.model, [part], forward=val_fn.forward)() for part in parts]
    for _ in range(2):
        measured = val_fn.measure()
        counts = measured.rows.weights
        assert len(counts) == len(parts)
        assert sum(counts) == measured.weight
        expected = [loss * count for loss, count in zip(alone, counts, strict=True)]
        assert measured.rows.sums == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_batches_are_the_units_of_a_loss_that_rows_do_not_add_up_to(name):
    parts = [rows(of_tokens(), 0, 4), rows(of_tokens(), 4, 6)]
    if name == "labels that are no classes":
        parts[0]["labels"][0, 3] = 500
    assert_batches_are_units(ValidationLoss(Head(OTHER_LOSSES[name]), parts), parts)


@pytest.mark.parametrize("split", [6, 4, 1])
def test_a_sum_over_the_labels_is_measured_as_their_mean_however_it_is_split(split):
    batch = of_tokens()
    expected = ValidationLoss(Head(mean), [batch]).measure()
    parts = [rows(batch, start, start + split) for start in range(0, 6, split)]
    sums = Head(lambda x, y: mean(x, y, reduction="sum"))
    val_fn = ValidationLoss(sums, parts)
    for _ in range(2):
        measured = val_fn.measure()
        assert measured.loss == pytest.approx(expected.loss, rel=1e-5)
        assert measured.weight == expected.weight
        assert measured.rows.sums == pytest.approx(expected.rows.sums, rel=1e-5)


def test_batches_are_the_units_where_there_are_no_logits():
    model, batch = case("causal")
    model.register_forward_hook(lambda *args: SimpleNamespace(loss=args[-1].loss))
    parts = [rows(batch, 0, 4), rows(batch, 4, 6)]
    assert_batches_are_units(ValidationLoss(model, parts), parts)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits[:, -4:],
        lambda logits: logits[0],
        lambda logits: (logits,),
        lambda logits: torch.cat([logits, logits], 1),
    ],
    ids=["fewer places", "one row", "no tensor", "more places behind"],
)
def test_batches_are_the_units_where_logits_are_not_those_of_the_labels(change):
    model, batch = case("causal")
    model.register_forward_hook(
        lambda *args: SimpleNamespace(loss=args[-1].loss, logits=change(args[-1].logits))
    )
    assert_batches_are_units(ValidationLoss(model, [batch]), [batch])


def test_batches_without_labels_are_units_and_leave_nothing_open():
    class Model(nn.Linear):
        def forward(self, x):
            return SimpleNamespace(loss=super().forward(x).square().mean(), logits=x)

    val_fn = ValidationLoss(Model(2, 1), [{"x": torch.randn(rows, 2)} for rows in (3, 5)])
    assert val_fn.measure().rows.weights == (3, 5)
    assert val_fn._is_settled(), "or no CUDA graph would ever be recorded"


def test_a_loss_that_the_model_has_rounded_to_16_bits_is_recognised():
    batch = of_tokens()
    model = Head(lambda x, y: mean(x, y).bfloat16())
    found = ValidationLoss(model, [batch]).measure()
    exact = ValidationLoss(Head(mean), [batch]).measure()
    assert found.loss != exact.loss
    assert found.rows == exact.rows


def test_what_a_first_loss_that_is_no_number_leaves_open_the_next_one_decides():
    factor = [math.nan]
    batch = of_tokens()
    val_fn = ValidationLoss(Head(lambda x, y: factor[0] * mean(x, y)), [batch])
    assert math.isnan(val_fn.measure().loss)
    factor[0] = 1.0
    assert len(val_fn.measure().rows.sums) == 6
    factor[0] = math.nan  # from now on the units stay
    assert len(val_fn.measure().rows.sums) == 6


def test_one_synchronisation_a_call_with_rows_too(monkeypatch):
    model, batch = case("causal")
    val_fn = ValidationLoss(model, [rows(batch, row, row + 2) for row in range(4)])
    val_fn.measure()
    copies = []
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, original=original, name=name):
            copies.append((name, tensor.dtype))
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    val_fn.measure()
    assert [name for name, dtype in copies if dtype == torch.float64] == ["tolist"]
    assert len(val_fn.measure().rows.sums) == 8


# Several ranks


@pytest.mark.parametrize("split", [True, False])
def test_each_rank_has_the_rows_of_its_own_share(split):
    model, batch = case("causal")
    parts = [rows(batch, row, row + 2) for row in (0, 2, 4)]
    whole = ValidationLoss(model, parts).measure()
    found = []
    for rank in range(2):
        val_fn = ValidationLoss(model, parts if split else parts[2 * rank : 2 * rank + 2])
        val_fn.new_stage()
        with val_fn.share(rank, 2, 2, split=split):
            found.append(val_fn.measure().rows)
    # Rank 1 makes a second forward that counts for nothing.
    assert [len(part.sums) for part in found] == [4, 2]
    pairs = [Paired.of(part, Rows(part.sums, part.weights)) for part in found]
    assert Paired.combine(pairs).n == len(whole.rows.sums)
    assert sorted(sum((part.sums for part in found), ())) == pytest.approx(sorted(whole.rows.sums))


# A forward of one's own


def forward(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    counts = (labels != -100).sum(1)
    return losses.sum() / counts.sum(), counts.sum(), (losses.sum(1), counts)


def test_a_forward_of_ones_own_may_return_the_sums_of_its_rows():
    model, batch = case("causal")
    parts = [rows(batch, 0, 2), rows(batch, 2, 6)]
    found = ValidationLoss(model, parts, forward=forward).measure()
    expected = ValidationLoss(model, parts).measure()
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.rows.weights == expected.rows.weights
    assert found.rows.sums == pytest.approx(expected.rows.sums, rel=1e-5)


@pytest.mark.parametrize(
    ("sums", "words"),
    [
        (torch.ones(2), "got Tensor"),
        ((torch.ones(2), torch.ones(3)), r"got \[\(2,\), \(3,\)\]"),
        ((torch.ones(2, 1), torch.ones(2, 1)), r"got \[\(2, 1\), \(2, 1\)\]"),
        ((1.0, 2.0), "got tuple"),
        ((torch.ones(2),), r"got \[\(2,\)\]"),
    ],
)
def test_rows_that_are_no_pair_of_vectors_are_refused(sums, words):
    with pytest.raises(TypeError, match=rf"must be \(sums, weights\): two tensors.*{words}"):
        ValidationLoss(nn.Linear(1, 1), [0], forward=lambda model, batch: (1.0, 1, sums))
