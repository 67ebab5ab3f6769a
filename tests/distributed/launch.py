"""Run checks on several ranks, started by torch's own launcher, and hand out what came of each.

As a script it is one rank:

    torchrun --nproc-per-node 2 -m tests.distributed.launch out.json agreement sharding

With ``CHECKS_DEVICE=cuda CHECKS_BACKEND=cpu:gloo,cuda:nccl`` each rank has a GPU of its own.
"""

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent.parent
DEVICE = os.environ.get("CHECKS_DEVICE", "cpu")
# A check in which the ranks wait for each other in vain ends with this.
TIMEOUT = timedelta(seconds=60)


def launch(size, folder, modules):
    """What failed in each check, by name: a traceback of each rank on which it did."""
    out = folder / f"failures-{size}.json"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}",
        "-m", "tests.distributed.launch", str(out), *modules,
    ]  # fmt: skip
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CHECKPOINTS": str(folder)
    }  # fmt: skip
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    if not out.exists():
        raise RuntimeError(f"no rank came to the end:\n{result.stdout}\n{result.stderr[-8000:]}")
    print(result.stdout)
    return json.loads(out.read_text())


def names(module):
    """The checks in the text of a module, which need not be imported here."""
    text = (Path(__file__).parent / f"{module}.py").read_text()
    return [
        line[len("def check_") :].split("(")[0]
        for line in text.splitlines()
        if line.startswith("def check_")
    ]


def alone(folder, modules):
    """The same of one rank, which is this process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with mock.patch.dict(os.environ, CHECKPOINTS=str(folder)):
            return run(modules)
    finally:
        dist.destroy_process_group()


def main(out, modules):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    backend, device = os.environ.get("CHECKS_BACKEND", "gloo"), None
    if DEVICE == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=device)
    failures = run(modules)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(failures))
    dist.destroy_process_group()


def run(modules):
    """Run the checks of these modules on this rank; gives the failures of all ranks."""
    import torch
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    failures = {}
    for module in modules:
        imported = importlib.import_module(f"tests.distributed.{module}")
        for name in names(module):
            failure, start = None, time.perf_counter()
            torch.manual_seed(0)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    for message in imported.EXCEPTIONS:
                        warnings.filterwarnings("ignore", message)
                    getattr(imported, f"check_{name}")(rank, size)
            except BaseException:
                failure = traceback.format_exc()
                print(failure, flush=True)
            gathered = [None] * size
            dist.all_gather_object(gathered, failure)
            if rank == 0:
                print(f"{time.perf_counter() - start:6.2f} s  {name}", flush=True)
            failures[name] = [
                f"rank {place} of {size}:\n{text}" for place, text in enumerate(gathered) if text
            ]
    return failures


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
