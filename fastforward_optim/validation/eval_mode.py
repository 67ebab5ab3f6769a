"""Put a model into eval mode for a measurement, and restore each module's mode afterwards."""

from __future__ import annotations

from torch import nn


class EvalMode:
    """Switches a model to eval mode when first needed, and restores its modes afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before: list[tuple[nn.Module, bool]] = []

    def to_eval(self) -> None:
        """Switch the model to eval mode, unless that was done before."""
        if not self._before:
            self._before = [(module, module.training) for module in self._model.modules()]
            self._model.eval()

    def put_back(self) -> None:
        """Restore each module's mode, if the model was switched to eval mode."""
        if self._before:
            # Call train() first, since some modules override it; then restore each module's mode.
            self._model.train(self._before[0][1])
            for module, mode in self._before:
                if module.training != mode:
                    module.training = mode
