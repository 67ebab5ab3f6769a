"""Gradients far larger than usual, scaled down before the step.

Next to the highest rate that works, a run of many hundred steps meets a few gradients whose norm is
ten or a hundred times the usual one. Each throws the weights far, and leaves a trace in the moments
of the optimizer. Limits that follow the recent norms are known from AutoClip (Seetharaman et al.
2020) and ZClip (Kumar et al. 2025). Knows tensors and param groups.
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

# The mean and the variance of the norms' logarithms look back over about so many steps.
_STEPS = 20

Closure = Callable[..., Any]


class GradientSpikes:
    """Scales gradients down to a limit that follows the norms of the recent steps.

    The limit is ``factor`` times the geometric mean of these norms, or the mean of their logarithms
    plus ``deviations`` times its standard deviation, whichever is higher. No wait for the device:
    a gradient below the limit is multiplied by exactly one.

    Args:
        factor: how many times the usual norm is a spike.
        deviations: how many standard deviations are.
    """

    def __init__(self, factor: float, deviations: float) -> None:
        self.factor = factor
        self.deviations = deviations
        # Number of norms, up to _STEPS; mean and variance of their logarithms.
        self._norms = torch.zeros(3)

    def clip(self, param_groups: Iterable[Mapping[str, Any]]) -> None:
        """Scale the gradients down, all by one factor, if their norm exceeds the limit.

        A norm that is zero or not finite changes nothing. Sparse gradients are left alone.
        """
        kinds = _by_mesh(p for group in param_groups for p in group["params"])
        if not kinds:
            return
        with torch.no_grad():
            log_norm = _norm(kinds).log()
            known = self._norms.to(log_norm.device)
            count, mean, variance = known.unbind()
            margin = torch.clamp(self.deviations * variance.sqrt(), min=math.log(self.factor))
            limit = torch.where(count > 0, mean + margin, log_norm)
            usable = log_norm.isfinite()
            # A limit of 1 for this scales by exactly one where it is 0.
            excess = torch.where(usable & (log_norm > limit), (log_norm - limit).exp(), 0.0)
            count = torch.clamp(count + 1, max=_STEPS)
            change = torch.minimum(log_norm, limit) - mean
            mean = mean + change / count
            variance = (1 - 1 / count) * (variance + change**2 / count)
            self._norms = torch.where(usable, torch.stack([count, mean, variance]), known)
        if excess.is_cpu and not excess:  # asked where there is no device to wait for
            return
        for params in kinds:
            clip_grads_with_norm_(params, 1.0, excess)

    def clipping(
        self, closure: Closure | None, param_groups: Iterable[Mapping[str, Any]]
    ) -> Closure | None:
        """Clip now, or if a closure computes the gradients return one that clips them then."""
        if not callable(closure):
            self.clip(param_groups)
            return closure

        def run(*args: Any, **kwargs: Any) -> Any:
            result = closure(*args, **kwargs)
            self.clip(param_groups)
            return result

        return run

    def state_dict(self) -> list[float]:
        """What is known of the norms: their number, and their logarithms' mean and variance."""
        norms: list[float] = self._norms.tolist()
        return norms

    @classmethod
    def from_state_dict(cls, law: Calibration, state: Sequence[float] | None) -> GradientSpikes:
        """Continue from what was saved; begin anew if nothing was.

        Raises:
            ValueError: it is damaged.
        """
        spikes = cls(law.spike, law.spike_deviations)
        if state is not None:
            if not (len(state) == 3 and all(map(is_finite, state)) and min(state[::2]) >= 0):
                raise ValueError(
                    f"the gradient norms in the state dict are damaged: {shortened(state)}"
                )
            spikes._norms = torch.tensor(state, dtype=torch.float32)
        return spikes


def _by_mesh(params: Iterable[Any]) -> list[list[Any]]:
    """Parameters with a dense gradient; sharded ones apart, since operations do not mix them."""
    kinds: dict[Any, list[Any]] = {}
    for p in params:
        gradient = p.grad
        if gradient is not None and gradient.layout == torch.strided:
            mesh = gradient.device_mesh if is_sharded(gradient) else None
            kinds.setdefault(mesh, []).append(p)
    return list(kinds.values())


def _norm(kinds: list[list[Any]]) -> Tensor:
    """Norm of all gradients together, on the first one's device; of sharded ones the whole's."""
    norms: list[Any] = [get_total_norm([p.grad for p in params]) for params in kinds]
    whole: list[Tensor] = [norm.full_tensor() if is_sharded(norm) else norm for norm in norms]
    first = whole[0].float()
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(first) for norm in whole]))
    return total
