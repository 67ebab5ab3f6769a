"""Fast Forward in diffusion: a LoRA teaches a tiny model of diffusers new images.

The base model learns to draw the digits 0 to 4, and its LoRA those from 5 to 9 (8 x 8 pixels, from
scikit-learn), so that nothing is downloaded. ``--model unet`` predicts the noise, as Stable
Diffusion 1.5 does, and ``--model transformer`` the velocity, as Stable Diffusion 3 does.

    pip install 'fastforward-optim[peft]' diffusers scikit-learn
    python examples/diffusion.py
    python examples/diffusion.py --plain --lr 3e-4 1e-3 3e-3    # AdamW at the same cost
"""

import argparse
import copy

import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from sklearn.datasets import load_digits

from fastforward_optim import FastForward, ValidationLoss, lora_parameters

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=300, help="of the base model and of the LoRA")
parser.add_argument("--model", choices=["unet", "transformer"], default="transformer")
parser.add_argument("--lr", type=float, nargs="+", default=[1e-5])
parser.add_argument("--seed", type=int, nargs="+", default=[0])
parser.add_argument("--plain", action="store_true", help="AdamW without Fast Forward")
options = parser.parse_args()
steps, rows = options.steps, 32

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
labels = torch.tensor(digits.target)
# In the place of a text encoder: one vector for each digit.
prompts = torch.randn(10, 1, 32, generator=torch.Generator().manual_seed(0))


def build():
    """The base model, with random weights."""
    if options.model == "unet":
        return UNet2DConditionModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            cross_attention_dim=32,
        )
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=1,
        out_channels=1,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        caption_projection_dim=64,
        pos_embed_max_size=8,
    )


def draw(chosen, generator):
    """A batch: images and their prompts, with the noise and the times that they are seen at."""
    count = len(chosen)
    return {
        "images": images[chosen],
        "prompts": prompts[labels[chosen]],
        "noise": torch.randn(count, 1, 8, 8, generator=generator),
        # Spread evenly: the loss differs far more from time to time than from image to image.
        "times": (torch.randperm(count, generator=generator) + 0.5) / count,
    }


def losses(model, batch):
    """The loss of each image of a batch."""
    clean, noise, times = batch["images"], batch["noise"], batch["times"].view(-1, 1, 1, 1)
    if options.model == "unet":
        angle = times * torch.pi / 2  # the cosine schedule
        noisy, target = angle.cos() * clean + angle.sin() * noise, noise
        output = model(noisy, batch["times"] * 1000, batch["prompts"])
    else:
        noisy, target = (1 - times) * clean + times * noise, noise - clean
        output = model(noisy, batch["prompts"], batch["prompts"][:, 0], batch["times"] * 1000)
    return (output.sample - target).square().mean((1, 2, 3))


def forward(model, batch):
    """For ``ValidationLoss``: mean, number of images, and the loss and the weight of each."""
    each = losses(model, batch)
    return each.mean(), len(each), (each, torch.ones_like(each))


def batches(chosen, seed):
    """Endless random batches; an image has new noise each time."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield draw(chosen[torch.randint(len(chosen), (rows,), generator=generator)], generator)


known, new = (labels < 5).nonzero()[:, 0], (labels >= 5).nonzero()[:, 0]
new = new[torch.randperm(len(new), generator=torch.Generator().manual_seed(0))]
validation, test, train = new[: 6 * rows], new[6 * rows : 12 * rows], new[12 * rows :]
# Noise and times belong to the validation examples: each measurement must see the same ones.
fixed = torch.Generator().manual_seed(1)
validation_batches = [draw(part, fixed) for part in validation.split(rows)]
test_batches = [draw(part, fixed) for part in test.split(rows) for _ in range(4)]

torch.manual_seed(0)
base = build()
optimizer = torch.optim.AdamW(base.parameters(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
for _, batch in zip(range(steps), batches(known, 0), strict=False):
    losses(base, batch).mean().backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
base.requires_grad_(False)


def finetune(lr, seed):
    """Train a LoRA for the cost of ``steps`` steps and print the test losses."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base).train()
    model.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    params = lora_parameters(model)
    ema = EMAModel(params, decay=0.98)

    optimizer, history = torch.optim.AdamW(params, lr=lr), []
    if not options.plain:
        val_fn = ValidationLoss(model, validation_batches, batches_per_stage=1, forward=forward)
        optimizer = FastForward(optimizer, val_fn, calibrate_lr=True, total_steps=steps)
        history = optimizer.history
    cost = 0.0  # in steps: a forward of as many images costs half of one
    budget = steps if options.plain else steps - 1.5  # finish() takes up to three forwards
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: max(0.0, 1 - cost / budget))
    for taken, batch in enumerate(batches(train, seed), start=1):
        losses(model, batch).mean().backward()
        optimizer.step()
        cost = taken + sum(stage.passes for stage in history) / 2
        decay.step()
        optimizer.zero_grad()
        ema.step(params)  # after the stage, if there was one
        if cost >= budget:
            break
    if not options.plain:
        optimizer.finish()
        print(history)

    test_loss = ValidationLoss(model, test_batches, forward=forward)
    last = test_loss()
    ema.copy_to(params)
    scale = 1 if options.plain else optimizer.lr_scale
    print(
        f"{options.model}, lr {lr:g} (times {scale:.3g}), seed {seed}: "
        f"test loss {last:.4f}, of the EMA {test_loss():.4f} after {taken} steps",
        flush=True,
    )


for seed in options.seed:
    for lr in options.lr:
        finetune(lr, seed)
