"""Calibration: find the multiplier of the user's schedule early in the run, then leave it alone.

The stages of a calibration, in order:

1. ``probe.py``: the first steps use a small fraction of the rate. A line search along them measures
   how far the loss falls, and so how large steps can be.
2. ``law.py``: the mean of the iterates moves from window to window. If it keeps its direction the
   rate is too low; if it turns back the rate is too high. This needs no forward pass.
3. ``law.py``: after a part of the run the rate is held. A check at the end of each window takes the
   run back if it has blown up.
4. ``gradient_spikes.py``: throughout, a gradient far larger than usual is scaled down.

``law.py`` and ``probe.py`` work on numbers only. ``iterates.py`` holds the tensors,
``calibrator.py`` combines these parts for the optimizer, and ``scaled_step.py`` takes a step at
another rate. This package does not depend on ``torch.optim``, models or other ranks.
"""

from .calibrator import ASCENT, UNCHANGED, Calibrator, Outcome
from .gradient_spikes import GradientSpikes
from .iterates import Iterates
from .law import Calibration, Phase, Rate, Standing, as_law

__all__ = [
    "ASCENT",
    "UNCHANGED",
    "Calibration",
    "Calibrator",
    "GradientSpikes",
    "Iterates",
    "Outcome",
    "Phase",
    "Rate",
    "Standing",
    "as_law",
]
