"""The same loss in less time: less padding, one change of mode a stage."""

import pytest
import torch

from fastforward_optim import FastForward, ValidationLoss
from fastforward_optim.validation.batches import group_by_length
from fastforward_optim.validation.cuda_graphs import CudaGraphs

from .conftest import same, tiny_llama, token_batch

LENGTHS = [[3, 40, 17, 5], [30, 8, 4, 40], [2, 2, 40, 9], [12, 40, 7, 6]]


def padded(lengths, *, pad_token=3, seed=0):
    """Rows of these lengths, padded at their ends as a collator does."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    tokens = torch.randint(4, 97, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": torch.where(mask == 1, tokens, pad_token),
        "attention_mask": mask,
        "labels": torch.where(mask == 1, tokens, -100),
    }


BATCHES = [padded(lengths, seed=seed) for seed, lengths in enumerate(LENGTHS)]


def tokens(batches):
    return sum(batch["input_ids"].numel() for batch in batches)


def test_the_loss_is_the_same_with_less_padding():
    model = tiny_llama()
    grouped = ValidationLoss(model, BATCHES, group_by_length=True)
    assert grouped() == pytest.approx(ValidationLoss(model, BATCHES)(), rel=1e-5)
    assert tokens(grouped.batches) < 0.6 * tokens(BATCHES)
    assert [len(batch["input_ids"]) for batch in grouped.batches] == [4] * 4
    assert all(batch["input_ids"].shape[1] % 8 == 0 for batch in grouped.batches)


def test_each_stage_measures_the_rows_that_it_would():
    model = tiny_llama()
    options = {"batches_per_stage": 2}
    grouped = ValidationLoss(model, BATCHES, group_by_length=True, **options)
    plain = ValidationLoss(model, BATCHES, **options)
    for _ in range(3):
        grouped.new_stage()
        plain.new_stage()
        assert grouped.weighted() == pytest.approx(plain.weighted(), rel=1e-5)


def test_padding_is_what_it_was_and_other_values_follow_their_rows():
    batches = [{**batch, "row": torch.arange(4) + 10 * i} for i, batch in enumerate(BATCHES)]
    for batch in batches:
        batch["first"] = batch["input_ids"][:, 0].clone()
    grouped = ValidationLoss(tiny_llama(), batches, group_by_length=True)
    rows = []
    for batch in grouped.batches:
        padding = batch["attention_mask"] == 0
        assert (batch["input_ids"][padding] == 3).all()
        assert (batch["labels"][padding] == -100).all()
        assert torch.equal(batch["first"], batch["input_ids"][:, 0])
        rows += batch["row"].tolist()
    assert sorted(rows) == sorted(int(row) for batch in batches for row in batch["row"])


def test_padding_on_the_left_stays():
    left = {name: value.flip(1) for name, value in padded([3, 9]).items()}
    model = tiny_llama()
    grouped = ValidationLoss(model, [left], group_by_length=True)
    assert grouped() == pytest.approx(ValidationLoss(model, [left])(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": None}, "needs an attention_mask"),
        ({"attention_mask": torch.ones(4)}, "needs an attention_mask"),
        ({"labels": torch.ones(4, 40, dtype=torch.long)}, "labels count where attention_mask"),
        ({"bias": torch.ones(2, 40)}, "cannot regroup 'bias'"),
        ({"use_cache": False}, "cannot regroup 'use_cache'"),
    ],
)
def test_what_cannot_be_regrouped_is_refused(change, message):
    batch = {name: value for name, value in {**BATCHES[0], **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        ValidationLoss(tiny_llama(), [batch], group_by_length=True)


def test_a_value_that_is_as_long_as_the_tokens_in_one_batch_only_is_not_cut():
    batches = [padded([3, 8]), padded([2, 5])]
    for batch in batches:
        batch["row"] = torch.arange(8.0).expand(2, 8)
    grouped = group_by_length(batches, 2)
    assert all(torch.equal(row, torch.arange(8.0)) for batch in grouped for row in batch["row"])


def test_batches_that_do_not_fit_together_are_refused():
    other = {**padded([3, 8]), "row": torch.zeros(2)}
    for batches in ([padded([2, 5]), other], [other, padded([2, 5])]):
        with pytest.raises(ValueError, match=r"rows together that have other values: .*'row'"):
            group_by_length(batches, 2)
    empty = {name: value[:0] for name, value in padded([3, 8]).items()}
    with pytest.raises(ValueError, match="a batch without rows; leave it out"):
        group_by_length([padded([2, 5]), empty], 2)


def test_a_row_without_any_token_stays():
    batch = padded([4, 8, 2])
    for name, value in (("attention_mask", 0), ("input_ids", 3), ("labels", -100)):
        batch[name][0] = value
    (grouped,) = group_by_length([batch], 1)
    assert grouped["attention_mask"].sum(1).tolist() == [0, 2, 8]
    assert same([grouped["input_ids"][2]], [batch["input_ids"][1]])


def test_stages_that_would_share_batches_are_refused():
    with pytest.raises(ValueError, match=r"not a multiple of batches_per_stage \(3\)"):
        ValidationLoss(tiny_llama(), BATCHES, batches_per_stage=3, group_by_length=True)
    with pytest.raises(ValueError, match="group them yourself"):
        ValidationLoss(
            tiny_llama(), BATCHES, group_by_length=True, forward=lambda model, batch: (0.0, 1)
        )


def test_the_model_changes_its_mode_once_a_stage_and_has_it_back(monkeypatch):
    model = tiny_llama()
    inner = model.model.layers[0]
    inner.eval()  # a part that is kept in eval mode
    val_fn = ValidationLoss(model, [token_batch(2, 8)])
    modes, measured = [], []
    train = model.train
    monkeypatch.setattr(model, "train", lambda mode=True: modes.append(mode) or train(mode))
    model.register_forward_pre_hook(lambda module, _: measured.append(module.training))
    optimizer = FastForward(torch.optim.SGD(model.parameters(), lr=0.1), val_fn, interval=1)
    model(**token_batch(2, 8, 1)).loss.backward()
    del measured[:]
    optimizer.step()
    assert len(measured) > 2
    assert not any(measured)
    assert modes == [False, True]
    assert model.training
    assert not inner.training


def test_the_mode_is_back_after_an_error_in_a_stage():
    model = tiny_llama()

    calls = []

    def forward(model, batch):
        assert not model.training
        calls.append(1)
        if len(calls) == 2:  # the first is when it is made
            raise RuntimeError("no loss today")
        return model(**batch).loss, 1

    val_fn = ValidationLoss(model, [token_batch(2, 8)], forward=forward)
    optimizer = FastForward(torch.optim.SGD(model.parameters(), lr=0.1), val_fn, interval=1)
    model(**token_batch(2, 8, 1)).loss.backward()
    with pytest.raises(RuntimeError, match="no loss today"):
        optimizer.step()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("batch", [0, "rows", {"first": 1}, [2, 3], torch.zeros(2)], ids=str)
def test_a_forward_of_ones_own_may_take_any_batch_with_cuda_graphs_too(batch):
    model = torch.nn.Linear(2, 1, bias=False)
    val_fn = ValidationLoss(
        model, [batch], forward=lambda model, batch: (model.weight.sum(), 1), cuda_graphs=True
    )
    assert [val_fn(), val_fn(), val_fn()] == pytest.approx([model.weight.sum().item()] * 3)


def test_graphs_are_given_up_once_also_where_a_warning_is_an_error():
    model = torch.nn.Linear(2, 1).to("meta")
    graphs = CudaGraphs(model)
    with pytest.raises(
        UserWarning, match="goes on without CUDA graphs: why; leave cuda_graphs out"
    ):
        graphs._give_up("why")
    assert not graphs._possible
