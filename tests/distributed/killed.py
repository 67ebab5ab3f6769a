"""One rank of several, one of which is killed in a stage: what do the others see?

MASTER_ADDR=... MASTER_PORT=... RANK=0 WORLD_SIZE=2 python -m tests.distributed.killed
"""

import os
import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from fastforward_optim import FastForward
from tests.regression import Regression, same


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank, problem, calls = dist.get_rank(), Regression(), []

    def val_fn():
        calls.append(1)
        if rank == 1 and len(calls) == 5:  # of which two before the first step
            os.kill(os.getpid(), signal.SIGKILL)
        return problem.val_loss()

    inner = torch.optim.SGD(problem.parameters, lr=0.01)
    optimizer = FastForward(inner, val_fn, interval=1)
    after = []
    inner.register_step_post_hook(lambda *_: after.append(problem.weights()))
    start = time.perf_counter()
    try:
        for number in range(5):
            problem.backward(number)
            optimizer.step()
    except RuntimeError as error:
        print(f"{time.perf_counter() - start:.1f} s")
        print("at the anchor" if same(problem.weights(), after[-1]) else "elsewhere")
        print(error, flush=True)
    os._exit(0)  # the group is broken: nothing to wait for


if __name__ == "__main__":
    main()
