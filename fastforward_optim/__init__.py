"""Fast Forward for low-rank training: a torch optimizer that repeats its last step while it helps.

The method is that of *Fast Forwarding Low-Rank Training* (EMNLP 2024, arXiv 2409.04206).
"""

from .calibration import Calibration
from .checkpoint.distributed import OptimizerState
from .history import History
from .optimizer import FastForward
from .peft import lora_parameters
from .record import StageRecord
from .search.line_search import BracketSearch, LineSearch, RepeatSearch
from .validation import ValidationFunction, ValidationLoss

__all__ = [
    "BracketSearch",
    "Calibration",
    "FastForward",
    "History",
    "LineSearch",
    "OptimizerState",
    "RepeatSearch",
    "StageRecord",
    "ValidationFunction",
    "ValidationLoss",
    "lora_parameters",
]
__version__ = "0.2.0"
