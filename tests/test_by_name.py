"""The recipes of docs/integrations/by-name.md, called as the programs call them.

The programs themselves need other versions of transformers than the tests have, or models that
cannot be had here. What stands in for them is real where it matters: transformers' ``Trainer``,
``accelerate``, and the calls that they make, in their order.
"""

import ast
import importlib
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer
from transformers.trainer import TrainingArguments

from fastforward_optim import FastForward, lora_parameters
from fastforward_optim.integrations.transformers import FastForwardCallback

from .conftest import same, through_a_file
from .documents import ROOT, blocks, session

PAGE = ROOT / "docs" / "integrations" / "by-name.md"


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """The files of the page, which can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    for block in blocks(PAGE):
        name = block.split()[1].strip(",:")
        tmp_path.joinpath(name).write_text(block)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    return tmp_path


def stand_in(monkeypatch, name, **contents):
    """A module in the place of the program's, with the packages that it is in."""
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    package, _, child = name.rpartition(".")
    if package:
        if package not in sys.modules or not isinstance(sys.modules[package], ModuleType):
            stand_in(monkeypatch, package)
        monkeypatch.setattr(sys.modules[package], child, module, raising=False)
    return module


def by_name(name):
    """As all of these programs find a class."""
    module, _, kind = name.rpartition(".")
    return getattr(importlib.import_module(module), kind)


def trainer_options(folder, **options):
    return {
        "output_dir": str(folder), "max_steps": 12, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", **options,
    }  # fmt: skip


def callbacks_of(trainer):
    return [c for c in trainer.callback_handler.callbacks if isinstance(c, FastForwardCallback)]


def test_axolotls_plugin(recipes, monkeypatch):
    class BasePlugin:
        def post_trainer_create(self, cfg, trainer):
            """Nothing."""

    stand_in(monkeypatch, "axolotl.integrations.base", BasePlugin=BasePlugin)
    plugin = by_name("fast_forward_plugin.FastForwardPlugin")()
    names = session(recipes)
    trainer = Trainer(
        names["model"], TrainingArguments(**trainer_options(recipes)),
        train_dataset=names["train_set"], eval_dataset=names["validation_set"],
    )  # fmt: skip
    plugin.post_trainer_create({}, trainer)
    trainer.train()
    (callback,) = callbacks_of(trainer)
    assert [record.step for record in callback.optimizer.history] == [6, 12, 12]


def test_llama_factorys_trainer(recipes, monkeypatch):
    made = []

    class CustomSeq2SeqTrainer(Seq2SeqTrainer):
        def __init__(self, finetuning_args, processor, **kwargs):
            kwargs["processing_class"] = kwargs.pop("tokenizer")
            super().__init__(**kwargs)
            made.append(self)

    def run_exp():
        names = session(recipes)
        trainer = workflow.CustomSeq2SeqTrainer(
            model=names["model"], args=Seq2SeqTrainingArguments(**trainer_options(recipes)),
            finetuning_args=None, processor=None, tokenizer=None, callbacks=[],
            train_dataset=names["train_set"], eval_dataset=names["validation_set"],
        )  # fmt: skip
        trainer.train()

    workflow = stand_in(
        monkeypatch,
        "llamafactory.train.sft.workflow",
        CustomSeq2SeqTrainer=CustomSeq2SeqTrainer,
    )
    stand_in(monkeypatch, "llamafactory.train.tuner", run_exp=run_exp)
    importlib.import_module("train")
    (callback,) = callbacks_of(made[0])
    assert [record.step for record in callback.optimizer.history] == [6, 12, 12]


def test_a_trainers_optimizer_class(recipes):
    names = session(recipes)
    exec(recipes.joinpath("with_trainer.py").read_text(), names)
    optimizer = names["AdamW"].latest
    assert isinstance(optimizer, FastForward)
    assert [record.step for record in optimizer.history] == [6, 12, 12]
    assert names["trainer"].optimizer.optimizer is optimizer


def test_a_class_by_its_name_is_an_optimizer_as_any_other(recipes):
    kind = by_name("calibrated.AdamW")
    names = session(recipes)
    model, losses = names["model"], lambda: float(names["model"](**names["val_batches"][0]).loss)

    def train(optimizer, batches):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    # Groups with rates of their own, and a generator of tensors.
    params = lora_parameters(model)
    groups = [{"params": iter(params[:2]), "lr": 1e-4}, {"params": params[2:], "lr": 5e-5}]
    optimizer = kind(groups, lr=1e-4, total_steps=12, weight_decay=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-4, 5e-5]
    with pytest.raises(RuntimeError, match="set the optimizer's val_fn before the first step"):
        train(optimizer, names["loader"][:1])
    optimizer.val_fn = losses
    train(optimizer, names["loader"][:8])
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    train(optimizer, names["loader"][8:])
    expected = [p.detach().clone() for p in params]

    model.load_state_dict(saved["model"])
    resumed = kind(
        [{"params": params[:2]}, {"params": params[2:]}], lr=1e-4, total_steps=12, val_fn=losses
    )
    resumed.load_state_dict(saved["optimizer"])
    train(resumed, names["loader"][8:])
    assert same(params, expected)
    assert resumed.history[-1].step == 12


class Images:
    """A group of data sets: gives batches by their place."""

    def __init__(self, seeds):
        generator = torch.Generator().manual_seed(seeds)
        self.images = torch.randn(8, 2, 4, generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        return {"latents": self.images[place], "loss_weights": torch.ones(2)}


class NetworkTrainer:
    """Makes the calls of sd-scripts that the recipe relies on, in their order."""

    def assert_extra_args(self, args, train_dataset_group, val_dataset_group):
        pass

    def process_batch(
        self, batch, text_encoders, unet, network, vae, accelerator, args, *, is_train=True
    ):
        clean = batch["latents"].to(accelerator.device)
        noise = torch.randn_like(clean)
        times = torch.rand(len(clean), 1)
        with torch.set_grad_enabled(is_train), accelerator.autocast():
            output = unet(clean + times * noise) + network(clean + times * noise)
        return ((output - noise).square().mean(1) * batch["loss_weights"]).mean()

    def train(self, args):
        train, validation = Images(0), Images(1)
        self.assert_extra_args(args, train, validation)
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        unet, network = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4, bias=False)
        keys = dict(word.split("=") for word in args.optimizer_args)
        options = {key: ast.literal_eval(value) for key, value in keys.items()}
        params = [{"params": network.parameters(), "lr": args.learning_rate}]
        optimizer = by_name(args.optimizer_type)(params, lr=args.learning_rate, **options)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, args.max_train_steps)
        unet = accelerator.prepare(unet)
        network, optimizer, scheduler = accelerator.prepare(network, optimizer, scheduler)
        for step in range(args.max_train_steps):
            with accelerator.accumulate(network):
                batch = train[step % len(train)]
                loss = self.process_batch(batch, [], unet, network, None, accelerator, args)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)


def test_sd_scripts(recipes, monkeypatch):
    stand_in(monkeypatch, "library.train_util")
    setup_parser = SimpleNamespace
    stand_in(monkeypatch, "train_network", NetworkTrainer=NetworkTrainer, setup_parser=setup_parser)
    trainer = importlib.import_module("train_calibrated").Trainer()
    trainer.train(
        SimpleNamespace(
            optimizer_type="calibrated.AdamW", optimizer_args=["total_steps=48"],
            learning_rate=1e-5, max_train_steps=48,
        )
    )  # fmt: skip
    optimizer = by_name("calibrated.AdamW").latest
    history = optimizer.history
    assert (history[0].step, history[-1].step) == (6, 48)
    assert history[-1].kind == "finish"
    assert history[-1].loss_after < history[0].loss_before
    # Each image has noise of its own, which is the same each time.
    state = torch.get_rng_state()
    losses = optimizer.val_fn.measure().rows.sums
    assert optimizer.val_fn.measure().rows.sums == losses
    assert len(set(losses)) == 4
    assert torch.equal(torch.get_rng_state(), state)
