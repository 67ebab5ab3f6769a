"""What TRL's trainers prepare themselves: the callback takes it raw, as their ``evaluate`` does."""

import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from fastforward_optim.integrations.transformers import FastForwardCallback, TrainerLoss

from .conftest import fixed, tiny_llama

pytest.importorskip("trl")
from datasets import Dataset, IterableDataset
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from .test_trl import OPTIONS, text, tokenizer

# trl 1.16 says so of each of them; GKD's loss releases the memory of a GPU that is not there.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*TRL_EXPERIMENTAL_SILENCE"),
    pytest.mark.filterwarnings("ignore:.*trl.experimental"),
]

CHAT = (
    "{% for message in messages %}{{ message['role'] == 'user' and '7' or '8' }} "
    "{{ message['content'] }} {% endfor %}"
)
ROWS = range(12)


def chat_tokenizer():
    words = tokenizer()
    words.chat_template = CHAT
    words.padding_side = "left"
    return words


def talk(row):
    return [
        {"role": "user", "content": text(row, 3)},
        {"role": "assistant", "content": text(100 + row, 2 + row % 3)},
    ]


# Columns by name: a function of the row.
TEXT = {"text": lambda row: text(row, 5 + row % 4)}
MESSAGES = {"messages": talk}
COMPLETIONS = {
    "prompt": lambda row: text(row, 3) + " ",
    "completion": lambda row: text(100 + row, 2 + row % 3),
}
PAIRS = {
    "prompt": lambda row: text(row, 3) + " ",
    "chosen": lambda row: text(100 + row, 4),
    "rejected": lambda row: text(200 + row, 2 + row % 3),
}
WHOLE_PAIRS = {
    "chosen": lambda row: text(row, 3) + " " + text(100 + row, 4),
    "rejected": lambda row: text(row, 3) + " " + text(200 + row, 2 + row % 3),
}
TALKS = {
    "prompt": lambda row: talk(row)[:1],
    "chosen": lambda row: talk(row)[1:],
    "rejected": lambda row: talk(row + 1)[1:],
}
JUDGED = {**COMPLETIONS, "label": lambda row: row % 2 == 0}
TRIPLES = {**PAIRS, "reference": lambda row: text(300 + row, 4)}


def rows_of(columns):
    return [{name: make(row) for name, make in columns.items()} for row in ROWS]


def classifier():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_labels=1, pad_token_id=95, use_cache=False,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def build(kind, config, folder, columns, model=tiny_llama, options=(), **others):
    data = Dataset.from_list(rows_of(columns))
    common = {name: value for name, value in OPTIONS.items() if name != "max_length"}
    arguments = config(str(folder), **{**common, "max_length": 16, **dict(options)})
    return kind(
        model=model(), args=arguments, train_dataset=data, eval_dataset=data,
        processing_class=chat_tokenizer(), **others,
    )  # fmt: skip


def reference(**options):
    return {"ref_model": tiny_llama(), "options": options}


def teacher():
    return {"teacher_model": tiny_llama(), "options": {"lmbda": 0.0}}


CASES = {
    "sft-text": (SFTTrainer, SFTConfig, TEXT, {}),
    "sft-messages": (SFTTrainer, SFTConfig, MESSAGES, {}),
    "sft-packed": (SFTTrainer, SFTConfig, TEXT, {"options": {"packing": True}}),
    "dpo-pairs": (DPOTrainer, DPOConfig, PAIRS, reference),
    "dpo-talks": (DPOTrainer, DPOConfig, TALKS, reference),
    "dpo-reference-before": (
        DPOTrainer, DPOConfig, PAIRS, lambda: reference(precompute_ref_log_probs=True),
    ),
    "kto": (KTOTrainer, KTOConfig, JUDGED, reference),
    "reward": (RewardTrainer, RewardConfig, PAIRS, {"model": classifier}),
    "cpo": (CPOTrainer, CPOConfig, PAIRS, {}),
    "orpo": (ORPOTrainer, ORPOConfig, WHOLE_PAIRS, {}),
    "tpo": (TPOTrainer, TPOConfig, TRIPLES, {}),
    "gkd": (GKDTrainer, GKDConfig, MESSAGES, teacher),
}  # fmt: skip


def trainer_of(case, folder):
    kind, config, columns, others = CASES[case]
    return build(kind, config, folder, columns, **(others() if callable(others) else others))


def given(columns, form):
    rows = rows_of(columns)
    return {
        "dataset": Dataset.from_list,
        "list": list,
        "stream": lambda rows: IterableDataset.from_generator(lambda: iter(rows)),
        "generator": lambda rows: (row for row in rows),
    }[form](rows)


@pytest.mark.parametrize("case", CASES)
def test_raw_examples_are_prepared_as_the_trainer_prepares_its_own(tmp_path, case):
    trainer = trainer_of(case, tmp_path)
    expected = trainer.evaluate()["eval_loss"]
    for form in ("dataset", "list", "stream", "generator"):
        val_fn = TrainerLoss(trainer, given(CASES[case][2], form), len(ROWS), False)
        assert val_fn() == pytest.approx(expected, rel=1e-6), form
    prepared = TrainerLoss(trainer, list(trainer.eval_dataset), len(ROWS), False)
    assert prepared() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("case", ["sft-text", "reward", "cpo"])
def test_a_run_with_raw_examples_has_its_stages(tmp_path, case):
    trainer = trainer_of(case, tmp_path)
    callback = FastForwardCallback(given(CASES[case][2], "list"), **fixed(2)).attach(trainer)
    trainer.train()
    assert [record.step for record in callback.optimizer.history] == [2, 4]


def test_no_more_is_read_than_may_be_measured_and_that_once(tmp_path):
    trainer, read = trainer_of("sft-text", tmp_path), []

    def rows():
        for row in rows_of(TEXT) * 100:
            read.append(row)
            yield row

    FastForwardCallback(rows(), num_examples=6, calibrate_lr=True).attach(trainer)
    assert len(read) == 36, "six sets"


def test_of_examples_that_are_packed_or_left_out_more_are_read(tmp_path):
    packed = trainer_of("sft-packed", tmp_path)
    rows = rows_of(TEXT) * 8
    found = TrainerLoss(packed, rows, 8, False)
    assert found.num_examples == 8
    trainer = trainer_of("reward", tmp_path)
    long = {"prompt": text(0, 30) + " ", "chosen": "1", "rejected": "2"}
    found = TrainerLoss(trainer, [long] * 6 + rows_of(PAIRS), 6, False)
    assert found() == pytest.approx(TrainerLoss(trainer, rows_of(PAIRS), 6, False)())


@pytest.mark.parametrize("case", ["sft-text", "dpo-pairs", "cpo"])
def test_what_a_trainer_cannot_prepare_is_said_when_it_is_given(tmp_path, case):
    trainer = trainer_of(case, tmp_path)
    words = re.escape("in val_data_or_fn of ['other'] (")
    for form in ("dataset", "list", "generator"):
        with pytest.raises(ValueError, match=words + ".*pass what trainer.evaluate"):
            FastForwardCallback(given({"other": str}, form)).attach(trainer)
    FastForwardCallback(lambda: 0.0).attach(trainer)  # the callback is not on it yet


def test_that_nothing_is_left_of_the_examples_is_said_when_they_are_given(tmp_path):
    trainer = trainer_of("reward", tmp_path)
    long = {"prompt": text(0, 30) + " ", "chosen": "1", "rejected": "2"}
    with pytest.raises(ValueError, match="leaves out all 6 examples in val_data_or_fn"):
        FastForwardCallback([long] * 6).attach(trainer)
