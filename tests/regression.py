"""A small real problem, and whether tensors are the same; without what takes seconds to import."""

import torch
from torch import nn


class Regression:
    """Fit a small network to fixed data: a loss that goes down, quick enough for many steps."""

    def __init__(self, *, device: str = "cpu", dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 2)
        ).to(device)
        self.inputs = torch.randn(96, 6).to(device)
        self.targets = torch.stack([self.inputs[:, 0] ** 2, self.inputs.sum(1).sin()], dim=1)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def loss(self, rows: slice) -> torch.Tensor:
        return nn.functional.mse_loss(self.model(self.inputs[rows]), self.targets[rows])

    def val_loss(self) -> torch.Tensor:
        return self.loss(slice(64, 96))

    def backward(self, step: int) -> torch.Tensor:
        """Gradients of the loss on the batch of ``step``, after zeroing."""
        self.model.zero_grad()
        start = step * 16 % 64
        loss = self.loss(slice(start, start + 16))
        loss.backward()
        return loss

    def train(self, optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
        for step in range(first, first + steps):
            self.backward(step)
            optimizer.step()

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are the same bit for bit, NaN and signed zeros included."""
    return len(first) == len(second) and all(
        a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)
        for a, b in zip(first, second, strict=True)
    )


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
