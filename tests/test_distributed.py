"""What several processes promise: each check runs on every rank, under torch's own launcher."""

import os
import re
import socket
import subprocess
import sys

import pytest

from .distributed.launch import ROOT, launch, names

# A checkpoint of four ranks goes on with two, and one of both in one process.
MODULES = {
    4: ["agreement", "sharding", "training", "checkpoints"],
    2: ["agreement", "sharding", "training", "checkpoints", "trainers"],
    1: ["checkpoints"],
}
CHECKS = [
    (size, name)
    for size, modules in MODULES.items()
    for module in modules
    for name in names(module)
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Of a number of ranks by check; they are launched when they are first asked for."""
    folder, found = tmp_path_factory.mktemp("ranks"), {}

    def of(size):
        for more in MODULES:  # most ranks first: fewer of them go on from their checkpoints
            if more >= size and more not in found:
                found[more] = launch(more, folder, MODULES[more])
        return found[size]

    return of


@pytest.mark.parametrize(("size", "check"), CHECKS)
def test_on_several_ranks(failures, size, check):
    assert not failures(size)[check], "\n".join(failures(size)[check])


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_rank_that_is_killed_is_noticed_at_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.killed"],
            cwd=ROOT,
            env=os.environ
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "3"}
            | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    results = [rank.communicate(timeout=120) for rank in ranks]
    assert ranks[1].returncode == -9
    for rank in (0, 2):
        out, err = results[rank]
        seconds, place, error = out.splitlines() or pytest.fail(err)
        assert float(seconds.removesuffix(" s")) < 30, "long before the group's timeout of 60 s"
        assert place == "at the anchor"
        assert "a rank did not take part in a Fast Forward stage after step 1" in error
        assert "it has died" in error


def torchrun(size, example, folder, *words):
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}",
         str(ROOT / "examples" / example), *words],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize("example", ["ddp.py", "accelerate_loop.py", "trainer.py"])
def test_an_example_runs_on_two_ranks_which_agree(example, tmp_path):
    out = torchrun(2, example, tmp_path, "--steps", "12")
    summaries = re.findall(r"Fast Forward: \d+ stages? up to step 12, .*?useful", out)
    assert summaries
    assert len(set(summaries)) == 1


def test_a_sharded_example_goes_on_with_fewer_ranks(tmp_path):
    assert "up to step 12" in torchrun(2, "fsdp2.py", tmp_path, "--steps", "12")
    out = torchrun(1, "fsdp2.py", tmp_path, "--steps", "6", "--resume", "checkpoint-12")
    assert re.search(r"Fast Forward: [3-9] stages up to step 18", out)
