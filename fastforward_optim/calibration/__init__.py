"""Calibration: find the multiplier of the user's schedule, early in the run, and leave it.

How it goes, in the order in which it happens:

1. ``probe.py``: the first steps are taken at a small part of the rate; a line search along them
   says how far the loss falls, and so of what size steps can be.
2. ``law.py``: the mean of the iterates moves from window to window; whether it goes on in one
   direction or turns back says whether the rate is too low or too high. No forward is needed.
3. ``law.py``: after a part of the run the rate is held. A check at each window's end takes the run
   back if it has blown up.
4. ``gradient_spikes.py``: all along, a gradient far larger than usual is scaled down.

``law.py`` and ``probe.py`` hold numbers only; ``iterates.py`` the tensors; ``calibrator.py`` puts
them together for the optimizer; ``scaled_step.py`` takes a step at another rate. Nothing here
knows ``torch.optim``, a model or other ranks.
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
