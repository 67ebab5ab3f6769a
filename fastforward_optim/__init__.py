"""Fast Forward for low-rank training: a torch optimizer that repeats its last step while it helps.

The method is that of *Fast Forwarding Low-Rank Training* (EMNLP 2024, arXiv 2409.04206).
"""

from .distributed_checkpoint import OptimizerState
from .history import History, StageRecord
from .line_search import BracketSearch, LineSearch, RepeatSearch
from .optimizer import FastForward
from .parameters import lora_parameters
from .validation import ValidationLoss

__all__ = [
    "BracketSearch",
    "FastForward",
    "History",
    "LineSearch",
    "OptimizerState",
    "RepeatSearch",
    "StageRecord",
    "ValidationLoss",
    "lora_parameters",
]
__version__ = "0.1.0"
