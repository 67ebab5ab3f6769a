"""Where a warning points: to the user's code, however deep in ours it is raised."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# Whose frames are not the user's.
_INSIDE = (str(Path(__file__).parent.parent), str(Path(torch.__file__).parent))


def level_of_the_caller() -> int:
    """The ``stacklevel`` of the user's code, for a warning of the function that asks."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level
