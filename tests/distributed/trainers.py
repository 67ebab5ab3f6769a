"""Checks, run on each rank: accelerate, the Trainer and Lightning, started by torch's launcher."""

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

from fastforward_optim import FastForward, ValidationLoss, lora_parameters
from tests.conftest import LOWEST, fixed, tiny_lora
from tests.distributed.training import EXCEPTIONS as OF_TRAINING
from tests.distributed.training import assert_same_on_all_ranks, count_up

EXCEPTIONS = [
    *OF_TRAINING,
    "barrier.*: using the device under current context",
    ".isinstance.treespec, LeafSpec.. is deprecated",
    ".*does not have many workers",
    "`pin_memory.* argument is set",
    "'pin_memory' argument is set",
    "find_unused_parameters",
]


def examples(rows, seed):
    batch = count_up(rows, 9, seed)
    return [{name: value[row] for name, value in batch.items()} for row in range(rows)]


def assert_agreed(optimizer, model):
    """All ranks have run the same stages, of which some helped, and have the same weights."""
    everything = [None] * dist.get_world_size()
    dist.all_gather_object(everything, [(r.step, r.trials) for r in optimizer.history])
    assert all(other == everything[0] for other in everything)
    assert len(optimizer.history) >= 3
    assert any(record.useful for record in optimizer.history)
    assert_same_on_all_ranks([p.detach() for p in lora_parameters(model)])


def check_accelerate(rank, size):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == size
    model = tiny_lora()
    val_fn = ValidationLoss(model, [count_up(4, 9, seed) for seed in (1, 2, 3)])
    base = torch.optim.AdamW(lora_parameters(model), lr=1e-3)
    fast_forward = FastForward(base, val_fn, line_search=LOWEST, **fixed(3))
    loader = DataLoader(examples(24 * size, 4), batch_size=2)
    net, optimizer, loader = accelerator.prepare(model, fast_forward, loader)
    for _ in range(2):
        for batch in loader:
            with accelerator.accumulate(net):
                accelerator.backward(net(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    assert [record.step for record in fast_forward.history] == [3, 6, 9, 12]
    assert_agreed(fast_forward, model)
    assert val_fn.batches_per_stage == 3


def check_accelerate_with_a_validation_loader_that_it_has_split(rank, size):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = tiny_lora()
    held_out = DataLoader(examples(4 * size, 9), batch_size=2)
    whole = ValidationLoss(model, held_out)()
    val_fn = ValidationLoss(model, accelerator.prepare(held_out))
    fast_forward = FastForward(torch.optim.SGD(lora_parameters(model), lr=1e-8), val_fn, 1)
    net, optimizer = accelerator.prepare(model, fast_forward)
    accelerator.backward(net(**count_up(2, 9, rank)).loss)
    optimizer.step()
    assert fast_forward.history[0].loss_before == pytest.approx(whole, rel=1e-5)


def check_the_trainer(rank, size):
    from transformers import Trainer, TrainingArguments

    from fastforward_optim.integrations.transformers import FastForwardCallback

    for calibrate_lr in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, max_steps=12, per_device_train_batch_size=2, learning_rate=1e-3,
                per_device_eval_batch_size=4, save_strategy="no", report_to=[], use_cpu=True,
                disable_tqdm=True, ddp_backend="gloo",
            )  # fmt: skip
            trainer = Trainer(tiny_lora(), arguments, train_dataset=examples(64, 4))
            assert trainer.args.world_size == size
            callback = FastForwardCallback(
                examples(16, 5), calibrate_lr=calibrate_lr, num_examples=8,
                line_search=None if calibrate_lr else LOWEST, **fixed(3),
            ).attach(trainer)  # fmt: skip
            trainer.train()
        assert_agreed(callback.optimizer, trainer.model)


def check_lightning(rank, size):
    from lightning import LightningModule, Trainer

    from fastforward_optim.integrations.lightning import FastForwardCallback

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny_lora()

        def training_step(self, batch, _):
            return self.model(input_ids=batch[0], labels=batch[0]).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(lora_parameters(self.model), lr=1e-3)

    def loader(rows, seed):
        return DataLoader(TensorDataset(count_up(rows, 9, seed)["input_ids"]), batch_size=2)

    module = Module()
    callback = FastForwardCallback(loader(16, 5), line_search=LOWEST, **fixed(3))
    trainer = Trainer(
        accelerator="cpu", devices=size, strategy="ddp", max_steps=12, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback],
    )  # fmt: skip
    assert trainer.world_size == size
    trainer.fit(module, loader(64 * size, 4))
    assert_agreed(callback.optimizer, module.model)
