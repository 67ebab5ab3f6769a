"""A process that forks others, each of which trains until it is killed, or to the end.

Torch is imported once, and each life costs a fork. Nothing is computed before the fork. It reads a
line of JSON for each life from standard input, and answers with one:

    {"arguments": [...], "kill": {"at": "trial", "number": 3}}  ->  {"killed": true}

``examples/resume.py`` is what trains, as it is. The kills are real (SIGKILL): of the process by
itself at a certain moment, or by this one after some time.
"""

import contextlib
import io
import json
import os
import random
import runpy
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from fastforward_optim import FastForward, ValidationLoss

EXAMPLE = Path(__file__).parents[2] / "examples" / "resume.py"
sys.path.insert(0, str(EXAMPLE.parent))  # as where it runs as a script


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # until it has come


def call_of(number):
    """A function that says whether this is that call of it, counted from 1."""
    calls = 0

    def is_it():
        nonlocal calls
        calls += 1
        return calls == number

    return is_it


def kill_before(owner, name, number):
    """Die in place of the call of that number."""
    real, is_it = getattr(owner, name), call_of(number)

    def call(*args, **kwargs):
        if is_it():
            die()
        return real(*args, **kwargs)

    setattr(owner, name, call)


class Cut:
    """A file of which a certain byte is the last that is written."""

    def __init__(self, file, size):
        self._file, self._left = file, size

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        data = bytes(data)
        if len(data) > self._left:
            self._file.write(data[: self._left])
            self._file.flush()
            die()
        self._left -= len(data)
        return self._file.write(data)


def kill_at(at, number, size=0):
    """See to it that this process dies at the given moment, if it gets there.

    Args:
        at: where; "step" is inside the wrapped optimizer's step, once some of the tensors have
            been changed.
        number: of the call, counted from 1.
        size: for "bytes", how many are written of that checkpoint.
    """
    if at == "trial":  # the weights are at a candidate, or the anchor
        kill_before(ValidationLoss, "_call", number)
    elif at == "step":
        kill_before(torch.Tensor, "addcdiv_", number)
    elif at == "candidate":  # the weights are neither the anchor nor the candidate
        kill_before(torch, "_foreach_lerp_", number)
    elif at == "stage":  # its result has been committed, and not recorded
        kill_before(FastForward, "_report", number)
    elif at == "fsync":
        kill_before(os, "fsync", number)
    elif at == "replace":  # written, and not renamed
        kill_before(os, "replace", number)
    elif at == "renamed":
        kill_before(os, "close", number)
    elif at == "bytes":
        real, is_it = torch.save, call_of(number)

        def save(obj, file, **options):
            return real(obj, Cut(file, size) if is_it() else file, **options)

        torch.save = save
    else:
        raise ValueError(at)


def live(arguments, kill):
    """A child's life; what it prints is of no interest."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    random.seed(0)  # each fork seeds it anew, as each start of Python does
    if kill and "at" in kill:
        kill_at(**kill)
    main = runpy.run_path(str(EXAMPLE))["main"]
    with contextlib.redirect_stdout(io.StringIO()):
        main(arguments)


def main():
    import peft  # noqa: F401 - what the example needs, before the fork
    import transformers.models.llama.modeling_llama  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                live(order["arguments"], order["kill"])
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        if order["kill"] and "after" in order["kill"]:
            time.sleep(order["kill"]["after"])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        answer = {
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "finished": os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0,
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
