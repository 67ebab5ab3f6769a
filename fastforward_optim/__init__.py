"""Fast Forward for low-rank training: a torch optimizer that repeats its last step while it helps.

The method is that of *Fast Forwarding Low-Rank Training* (EMNLP 2024, arXiv 2409.04206).
"""

from .calibration import Calibration
from .checkpoint.distributed import OptimizerState
from .checkpoint_file import load_checkpoint, save_checkpoint
from .history import History, StageRecord
from .optimizer import FastForward
from .peft import lora_parameters
from .random_state import random_state, set_random_state
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
    "load_checkpoint",
    "lora_parameters",
    "random_state",
    "save_checkpoint",
    "set_random_state",
]
__version__ = "0.1.0"
