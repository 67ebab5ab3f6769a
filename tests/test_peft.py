"""PEFT's methods: a stage moves the tensors that the adapter trains, and nothing else."""

import itertools

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from fastforward_optim import FastForward, ValidationLoss, lora_parameters

from .conftest import LOWEST, Untried, fixed, same, tiny_llama, tiny_lora, token_batch
from .test_lora_parameters import ADAPTERS, adapted


def four_bits(linear):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantized = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, quant_type="nf4"
    )
    quantized.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", module=quantized
    )
    # Where the CPU has these instructions, bitsandbytes packs the weights for inference in the
    # first forward in eval mode, and there is no backward any more.
    quantized.support_avx512bf16_for_cpu = False
    return quantized.to("cpu")


def eight_bits(linear):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantized = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
    )
    quantized.weight = bitsandbytes.nn.Int8Params(
        linear.weight.data, requires_grad=False, has_fp16_weights=False
    )
    return quantized.to("cpu")


def quantized_lora(quantize):
    model = tiny_llama()
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, quantize(child))
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))


def two_adapters():
    model = tiny_lora()
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("other")
    return model


def prefix_tuning():
    if Version(peft.__version__) < Version("0.18") and Version(transformers.__version__).major >= 5:
        pytest.skip(f"prefix tuning of peft {peft.__version__} calls what transformers 5 removed")
    return ADAPTERS["prefix tuning"]()


# One set is enough here.
pytestmark = pytest.mark.filterwarnings("ignore:the probe of a calibration")

TARGETS = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
METHODS = {
    **ADAPTERS,
    "prefix tuning": prefix_tuning,
    "PiSSA": lambda: tiny_lora(init_lora_weights="pissa"),
    "OLoRA": lambda: tiny_lora(init_lora_weights="olora"),
    "LoRA with B = 0": lambda: tiny_lora(init_lora_weights=True),
    "LoRA and an embedding": lambda: tiny_lora(modules_to_save=["embed_tokens"]),
    "LoRA and some tokens": lambda: tiny_lora(trainable_token_indices=[1, 2, 3]),
    "the other of two adapters": two_adapters,
    "LoRA on 4 bits": lambda: quantized_lora(four_bits),
    "LoRA on 8 bits": lambda: quantized_lora(eight_bits),
    "VeRA": lambda: adapted(peft.VeraConfig(r=4, **TARGETS)),
    "LoHa": lambda: adapted(peft.LoHaConfig(r=4, **TARGETS)),
    "LoKr": lambda: adapted(peft.LoKrConfig(r=4, **TARGETS)),
    "OFT": lambda: adapted(peft.OFTConfig(r=0, oft_block_size=8, **TARGETS)),
    "P-tuning": lambda: adapted(
        peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ),
    "adaption prompts": lambda: adapted(
        peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    ),
    "trainable tokens": lambda: adapted(
        peft.TrainableTokensConfig(token_indices=[1, 2], task_type="CAUSAL_LM")
    ),
}
BATCH = token_batch(4, 9)


def every_tensor(model):
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors}


def changed(before, after):
    return {name for name in before if not same([before[name]], [after[name]])}


def train(model, optimizer, steps, first=0):
    for _ in range(first, first + steps):
        model(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def run(model, val_fn, steps=2):
    """An optimizer whose stage comes after ``steps``, and every tensor before that stage."""
    base = torch.optim.AdamW(lora_parameters(model), lr=1e-4)
    optimizer = FastForward(base, val_fn, interval=steps, line_search=LOWEST)
    anchors = []
    base.register_step_post_hook(lambda *_: anchors.append(every_tensor(model)))
    train(model, optimizer, steps)
    return optimizer, anchors[-1]


@pytest.mark.parametrize("name", METHODS)
def test_a_stage_moves_all_that_is_trained_and_nothing_else(name):
    model = METHODS[name]()
    val_fn = ValidationLoss(model, [BATCH])  # the training batch: it pays to go further
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    optimizer, anchor = run(model, val_fn)
    (record,) = optimizer.history
    assert record.tau > 0
    assert record.loss_after < record.loss_before
    assert val_fn() == record.loss_after
    assert changed(anchor, every_tensor(model)) == trained


def assert_found_whole(model):
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert trained
    assert [id(p) for p in lora_parameters(model)] == trained


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # the base has never been saved
def test_the_classifier_of_x_lora_is_found(tmp_path):
    tiny_lora().save_pretrained(tmp_path)
    config = peft.XLoraConfig(hidden_size=32, adapters={"0": str(tmp_path)}, task_type="CAUSAL_LM")
    assert_found_whole(adapted(config))


@pytest.mark.skipif(
    not hasattr(peft, "ShadowConfig"), reason=f"peft {peft.__version__} has no Shadow"
)
def test_the_small_model_beside_the_base_model_is_found():
    assert_found_whole(adapted(peft.ShadowConfig(**TARGETS)))


@pytest.mark.parametrize("name", METHODS)
def test_a_stage_that_finds_nothing_changes_nothing(name):
    model = METHODS[name]()
    measured, losses = ValidationLoss(model, [BATCH]), itertools.count()
    optimizer, anchor = run(model, Untried(lambda: 0 * measured() + next(losses)))
    assert optimizer.history[0].tau == 0
    assert optimizer.history[0].passes > 1
    assert not changed(anchor, every_tensor(model))


def test_calibration_scales_both_of_lora_plus_rates():
    model = tiny_lora()
    base = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-5, loraplus_lr_ratio=16)
    optimizer = FastForward(base, ValidationLoss(model, [BATCH]), interval=2, calibrate_lr=True)
    rates, used = [group["lr"] for group in base.param_groups], []
    assert {group["lr"] for group in base.param_groups if group["params"]} == {1e-5, 16e-5}
    base.register_step_pre_hook(lambda o, *_: used.append([g["lr"] for g in o.param_groups]))
    for _ in range(10):
        expected = [rate * optimizer.lr_scale for rate in rates]
        train(model, optimizer, 1)
        assert used[-1] == expected
        assert [group["lr"] for group in base.param_groups] == rates
    assert optimizer.lr_scale > 2


@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_adalora_prunes_what_a_stage_has_moved(calibrate_lr):
    """A stage comes before the pruning of its step, so that what is pruned is zero again."""
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=6, deltaT=1, total_step=16, **TARGETS
    )
    model = adapted(config)
    val_fn = ValidationLoss(model, [BATCH])
    optimizer = FastForward(
        torch.optim.AdamW(lora_parameters(model), lr=1e-3),
        val_fn,
        calibrate_lr=calibrate_lr,
        line_search=None if calibrate_lr else LOWEST,
        **fixed(2),
    )
    values = [p for name, p in model.named_parameters() if "lora_E" in name]

    def kept():
        return sum(int((value != 0).sum()) for value in values)

    for step in range(16):
        model(**BATCH).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        if step > 16 - 6:
            assert kept() == 2 * len(values), "the budget"
    late = [record for record in optimizer.history if record.step > 10]
    assert calibrate_lr or any(record.useful for record in late), "stages that moved it"
    if calibrate_lr:
        optimizer.finish()
        model.base_model.update_and_allocate(16)
        assert kept() == 2 * len(values)


@pytest.mark.parametrize("calibrate_lr", [False, True])
def test_switching_between_adapters_in_mid_run_moves_the_active_one(calibrate_lr):
    model = tiny_lora()
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    mine = {name: p for name, p in model.named_parameters() if "lora_" in name}
    optimizer = FastForward(
        torch.optim.AdamW(mine.values(), lr=1e-4),
        ValidationLoss(model, [BATCH]),
        calibrate_lr=calibrate_lr,
        line_search=None if calibrate_lr else LOWEST,
        **fixed(2),
    )
    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)
        before, stages = every_tensor(model), len(optimizer.history)
        train(model, optimizer, 2)
        assert len(optimizer.history) == stages + 1
        assert calibrate_lr or optimizer.history[-1].tau > 0
        active = {name for name in mine if f".{adapter}." in name}
        assert changed(before, every_tensor(model)) == active


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # the base has never been saved
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "LoRA and modules_to_save", "IA3", "AdaLoRA"])
def test_an_adapter_saved_after_a_stage_is_the_one_that_was_measured(name, tmp_path):
    model = METHODS[name]()
    val_fn = ValidationLoss(model, [BATCH])
    optimizer, _ = run(model, val_fn)
    assert optimizer.history[0].tau > 0
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path, is_trainable=True)
    assert same(lora_parameters(loaded), lora_parameters(model))
    assert ValidationLoss(loaded, [BATCH])() == optimizer.history[0].loss_after
