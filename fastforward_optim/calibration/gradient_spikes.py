"""Scale down gradients that are far larger than usual before the step.

Near the highest rate that works, a run of many hundred steps meets a few gradients whose norm is
ten or a hundred times the usual one. Each of them throws the weights far away and leaves a trace in
the moments of the optimizer. AutoClip (Seetharaman et al. 2020) and ZClip (Kumar et al. 2025) also
use limits that follow the recent norms. This module handles tensors and param groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..saved_numbers import is_finite, shortened
from ..stage.sharded import is_sharded
from .law import Calibration

# The mean and the variance of the logarithms of the norms cover about this many steps.
_STEPS = 20

Closure = Callable[..., Any]


class GradientSpikes:
    """Scales gradients down to a limit that follows the norms of the recent steps.

    The limit is ``spike`` times the geometric mean of these norms, or the exponential of the mean
    of their logarithms plus ``spike_deviations`` times its standard deviation, whichever is higher.
    It never waits for the device: gradients below the limit are multiplied by exactly one.

    Args:
        law: the constants.
    """

    def __init__(self, law: Calibration) -> None:
        self.law = law
        # Number of norms, up to _STEPS, and the mean and the variance of their logarithms.
        self._norms = torch.zeros(3)

    def clip(self, param_groups: Iterable[Mapping[str, Any]]) -> None:
        """Scale all gradients down by one factor if their norm exceeds the limit.

        A norm that is zero or not finite changes nothing. Sparse gradients are left alone.
        """
        kinds = _by_mesh(p for group in param_groups for p in group["params"])
        if not kinds:
            return
        with torch.no_grad():
            log_norm = _norm(kinds).log()
            known = self._norms.to(log_norm.device)
            count, mean, variance = known.unbind()
            margin = self.law.spike_deviations * variance.sqrt()
            margin = margin.clamp(min=math.log(self.law.spike))
            limit = torch.where(count > 0, mean + margin, log_norm)
            usable = log_norm.isfinite()
            # With a limit of 1, an excess of 0 scales the gradients by exactly one.
            excess = torch.where(usable & (log_norm > limit), (log_norm - limit).exp(), 0.0)
            count = torch.clamp(count + 1, max=_STEPS)
            change = torch.minimum(log_norm, limit) - mean
            mean = mean + change / count
            variance = (1 - 1 / count) * (variance + change**2 / count)
            self._norms = torch.where(usable, torch.stack([count, mean, variance]), known)
        if excess.is_cpu and not excess:  # on a CPU this check does not wait for a device
            return
        for params in kinds:
            clip_grads_with_norm_(params, 1.0, excess)

    def clipping(
        self, closure: Closure | None, param_groups: Iterable[Mapping[str, Any]]
    ) -> Closure | None:
        """Clip now; if a closure computes the gradients, return a closure that clips them too."""
        if not callable(closure):
            self.clip(param_groups)
            return closure

        def run(*args: Any, **kwargs: Any) -> Any:
            result = closure(*args, **kwargs)
            self.clip(param_groups)
            return result

        return run

    def state_dict(self) -> list[float]:
        """Return the number of norms, and the mean and variance of their logarithms."""
        norms: list[float] = self._norms.tolist()
        return norms

    @classmethod
    def from_state_dict(cls, law: Calibration, state: Sequence[float] | None) -> GradientSpikes:
        """Restore a saved state; start afresh if ``state`` is None.

        Raises:
            ValueError: the state is damaged.
        """
        spikes = cls(law)
        if state is not None:
            if not (len(state) == 3 and all(map(is_finite, state)) and min(state[::2]) >= 0):
                raise ValueError(
                    f"the gradient norms in the state dict are damaged: {shortened(state)}; remove "
                    "'gradient_norms' from its 'fast_forward' part to start without them"
                )
            spikes._norms = torch.tensor(state, dtype=torch.float32)
        return spikes


def _by_mesh(params: Iterable[Any]) -> list[list[Any]]:
    """Group the parameters with a dense gradient by device mesh; operations do not mix meshes."""
    kinds: dict[Any, list[Any]] = {}
    for p in params:
        gradient = p.grad
        if gradient is not None and gradient.layout == torch.strided:
            mesh = gradient.device_mesh if is_sharded(gradient) else None
            kinds.setdefault(mesh, []).append(p)
    return list(kinds.values())


def _norm(kinds: list[list[Any]]) -> Tensor:
    """Return the norm of all gradients together, on the device of the first.

    For sharded gradients this is the norm of the whole tensors.
    """
    norms: list[Any] = [get_total_norm([p.grad for p in params]) for params in kinds]
    whole: list[Tensor] = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]
    first = whole[0].float()
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(first) for norm in whole]))
    return total
