"""Small modules that Lightning trains, and what is looked at after a run."""

import csv

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from torch import nn
from torch.utils.data import DataLoader

from fastforward_optim import FastForward, ValidationLoss


def rows(count, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 6, generator=generator)
    targets = torch.stack([inputs[:, 0] ** 2, inputs.sum(1).sin()], dim=1)
    return list(zip(inputs, targets, strict=True))


def loader(count, seed, batch_size=8, **options):
    return DataLoader(rows(count, seed), batch_size=batch_size, **options)


TRAIN, VALIDATION = loader(64, seed=1), loader(32, seed=2)


class Module(LightningModule):
    """A small network, as anyone writes it: it knows nothing of Fast Forward."""

    def __init__(self, lr=1e-3, configure=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
        self.lr = lr
        self.configure = configure

    def loss(self, batch):
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return optimizer if self.configure is None else self.configure(self, optimizer)

    def weights(self):
        return list(self.parameters())


def by_hand(*, scheduler=None, autocast=None, **options):
    """A ``configure_optimizers`` that returns a FastForward, with the data of VALIDATION."""

    def configure(module, optimizer):
        val_fn = ValidationLoss(
            module,
            VALIDATION,
            autocast=autocast,
            forward=lambda model, batch: (model.loss(batch), len(batch[0])),
            batches_per_stage=len(VALIDATION) // (2 if options.get("calibrate_lr") else 1),
        )
        optimizer = FastForward(optimizer, val_fn, **{"interval": 2, **options})
        module.fast_forward = optimizer
        return optimizer if scheduler is None else scheduler(optimizer)

    return configure


def trainer_of(folder, callbacks=(), **options):
    return Trainer(
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{
            "max_steps": 8,
            "accelerator": "cpu",
            "logger": False,
            "log_every_n_steps": 1,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **options,
        },
    )


def fit(folder, module=None, callbacks=(), data=TRAIN, val_data=None, ckpt_path=None, **options):
    module = Module() if module is None else module
    trainer = trainer_of(folder, callbacks, **options)
    trainer.fit(module, data, val_data, ckpt_path=ckpt_path)
    return trainer, module


def outcome(optimizer):
    """Where stages led: the first check after resuming measures once more, to the same end."""
    return [(r.step, r.loss_before, r.loss_after, r.lr_scale) for r in optimizer.history]


def steps(optimizer):
    return [record.step for record in optimizer.history]


def logged(trainer, name):
    """A column of the CSVLogger's file, by step; of several rows of a step the last one."""
    with open(f"{trainer.logger.log_dir}/metrics.csv") as file:
        found = {int(r["step"]): r[name] for r in csv.DictReader(file) if r.get(name)}
    return {step: float(value) for step, value in found.items()}


class Manual(Module):
    """Manual optimization, as Lightning's documentation has it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = self.loss(batch)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
