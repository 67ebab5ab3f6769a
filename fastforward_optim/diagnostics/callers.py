"""Make warnings point to the user's code, however deep in the library they are raised."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

# Folders of the code that is not the user's: this package and torch.
_INSIDE = (str(Path(__file__).parent.parent), str(Path(torch.__file__).parent))


def level_of_the_caller() -> int:
    """Return the ``stacklevel`` that makes a warning of the calling function point to user code."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level
