"""lora_parameters finds what PEFT trains as an adapter, and nothing else."""

import configparser
import sys
from pathlib import Path

import peft
import pytest
from torch import nn

from fastforward_optim import lora_parameters

from .conftest import tiny_llama, tiny_lora


def names(model):
    found = {id(p) for p in lora_parameters(model)}
    return [name for name, p in model.named_parameters() if id(p) in found]


def trainable(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def adapted(config):
    return peft.get_peft_model(tiny_llama(), config)


ADAPTERS = {
    "LoRA": lambda: tiny_lora(),
    "DoRA": lambda: tiny_lora(use_dora=True, init_lora_weights=True),
    "rsLoRA on an embedding": lambda: tiny_lora(
        use_rslora=True, target_modules=["q_proj", "embed_tokens"]
    ),
    "LoRA and modules_to_save": lambda: tiny_lora(modules_to_save=["lm_head"]),
    "IA3": lambda: adapted(
        peft.IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        )
    ),
    "AdaLoRA": lambda: adapted(
        peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, task_type="CAUSAL_LM")
    ),
    "prompt tuning": lambda: adapted(
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ),
    "prefix tuning": lambda: adapted(
        peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_is_found_whole(name):
    model = ADAPTERS[name]()
    assert names(model) == trainable(model)
    assert names(model)


def test_the_order_is_that_of_the_model(lora_model):
    wanted = [p for p in lora_model.parameters() if p.requires_grad]
    assert [id(p) for p in lora_parameters(lora_model)] == [id(p) for p in wanted]


def test_trainable_tensors_of_the_base_model_are_left_out():
    model = tiny_lora()
    wanted = names(model)
    for name, p in model.named_parameters():
        if "norm" in name or "mlp" in name:
            p.requires_grad_(True)
    assert names(model) == wanted


def test_an_adapter_that_is_not_active_is_left_out(lora_model):
    wanted = names(lora_model)
    lora_model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"]))
    assert names(lora_model) == wanted
    lora_model.set_adapter("other")
    assert names(lora_model)
    assert all(".other." in name for name in names(lora_model))


def test_an_adapter_injected_without_a_peft_model():
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), tiny_llama())
    assert len(names(model)) == 4


def test_a_model_without_an_adapter_is_told_how_to_get_one():
    for model in (nn.Linear(2, 2), tiny_llama()):
        with pytest.raises(
            ValueError, match=r"has no PEFT adapter; wrap it with peft.get_peft_model"
        ):
            lora_parameters(model)


def test_a_frozen_adapter_is_told_how_to_thaw(lora_model):
    lora_model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"none of its tensors is trainable.*is_trainable=True"):
        lora_parameters(lora_model)


def test_without_peft_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install -U 'fastforward-optim\[peft\]'"):
        lora_parameters(nn.Linear(2, 2))


def test_with_a_peft_that_is_too_old_the_error_says_which_is_needed(monkeypatch):
    monkeypatch.delattr("peft.utils.other.AuxiliaryTrainingWrapper")  # as in peft 0.14
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parent.parent / "setup.cfg")
    needed = setup["options.extras_require"]["peft"].strip().removeprefix("peft>=")
    with pytest.raises(
        ImportError, match=rf"needs peft {needed} or newer \(.*AuxiliaryTrainingWrapper"
    ):
        lora_parameters(nn.Linear(2, 2))
