"""Eval mode while a model is measured, and each module's own mode afterwards."""

from __future__ import annotations

from torch import nn


class EvalMode:
    """Switches a model to eval mode when first needed, and back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before: list[tuple[nn.Module, bool]] = []

    def to_eval(self) -> None:
        """Switch the model to eval mode, the first time."""
        if not self._before:
            self._before = [(module, module.training) for module in self._model.modules()]
            self._model.eval()

    def put_back(self) -> None:
        """Restore each module's mode, if it was changed."""
        if self._before:
            # Modules that override train() hear of the change; then each gets its own mode back.
            self._model.train(self._before[0][1])
            for module, mode in self._before:
                if module.training != mode:
                    module.training = mode
