"""A model's mode while it is measured: eval, and afterwards each module's own."""

from __future__ import annotations

from torch import nn


class EvalMode:
    """A model's mode, which is put to eval when that is first needed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before: list[tuple[nn.Module, bool]] = []

    def to_eval(self) -> None:
        """Put the model to eval mode, the first time that it is called."""
        if not self._before:
            self._before = [(module, module.training) for module in self._model.modules()]
            self._model.eval()

    def put_back(self) -> None:
        """Give each module the mode that it had, if that was changed."""
        if self._before:
            # Modules that override train() hear of the change; then each gets its own mode back.
            self._model.train(self._before[0][1])
            for module, mode in self._before:
                if module.training != mode:
                    module.training = mode
