"""``python -m tests.tiny_benchmarks``: the benchmarks' commands with a tiny model and task.

Other processes that a command starts import it too, and so have them.
"""

from benchmarks.__main__ import app
from benchmarks.data.tasks import TASKS, Task
from benchmarks.models.pretrained import MODELS

from .commands import numbers
from .conftest import tiny_llama
from .test_benchmarks import Words

TASKS["numbers"] = Task("numbers", numbers, "made up")
MODELS["tiny"] = lambda dtype: (tiny_llama().to(dtype), Words())

if __name__ == "__main__":
    app()
