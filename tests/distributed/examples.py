"""One rank of the examples for several ranks, one after the other, each with a port of its own.

MASTER_ADDR=... RANK=0 WORLD_SIZE=2 python -m tests.distributed.examples 12 29501 29502
"""

import os
import runpy
import sys

from tests.distributed.launch import ROOT

EXAMPLES = ("ddp.py", "fsdp2.py")


def main(steps, *ports):
    for example, port in zip(EXAMPLES, ports, strict=True):
        os.environ["MASTER_PORT"] = port
        sys.argv = [example, "--steps", steps]
        names = runpy.run_path(str(ROOT / "examples" / example), run_name="__main__")
        history = names["optimizer"].history
        print("history:", [(record.step, record.trials) for record in history], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
