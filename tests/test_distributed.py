"""What several processes promise: each check runs on every rank, under torch's own launcher."""

import os
import re
import runpy
import socket
import subprocess
import sys
from unittest import mock

import pytest

from .distributed.examples import EXAMPLES
from .distributed.launch import ROOT, alone, launch, names

# Each check once; a checkpoint of four ranks goes on with two, and one of both in one process.
MODULES = {
    4: ["agreement", "sharding", "replicas", "checkpoints"],
    2: ["training", "checkpoints", "trainers"],
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
                modules = MODULES[more]
                found[more] = launch(more, folder, modules) if more > 1 else alone(folder, modules)
        return found[size]

    return of


@pytest.mark.parametrize(("size", "check"), CHECKS)
def test_on_several_ranks(failures, size, check):
    assert not failures(size)[check], "\n".join(failures(size)[check])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(size, module, *words, folder=ROOT):
    """Start ranks without a launcher, which would end the others if one of them dies."""
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(size),
        "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", module, *words], cwd=folder,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def results_of(ranks):
    """What they print, as (output, errors)."""
    try:
        return [rank.communicate(timeout=200) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_rank_that_is_killed_is_noticed_at_once():
    ranks = start(3, "tests.distributed.killed")
    results = results_of(ranks)
    assert ranks[1].returncode == -9
    for rank in (0, 2):
        out, err = results[rank]
        seconds, place, error = out.splitlines() or pytest.fail(err)
        assert float(seconds.removesuffix(" s")) < 30, "long before the group's timeout of 60 s"
        assert place == "at the anchor"
        assert "a rank did not take part in a Fast Forward stage after step 1" in error
        assert "it has died" in error


@pytest.mark.filterwarnings("default")
def test_examples_agree_on_two_ranks_and_a_sharded_one_goes_on_alone(tmp_path, monkeypatch, capsys):
    ports = [free_port() for _ in EXAMPLES]
    ranks = start(2, "tests.distributed.examples", "12", *ports, folder=tmp_path)
    (first, error), (second, _) = results_of(ranks)
    assert first.count(" up to step 12") == len(EXAMPLES), error[-4000:]
    histories = [re.findall("^history: .*", out, re.MULTILINE) for out in (first, second)]
    assert histories[0] == histories[1]
    assert len(histories[0]) == len(EXAMPLES)

    monkeypatch.chdir(tmp_path)
    words = ["fsdp2.py", "--steps", "6", "--resume", "checkpoint-12"]
    monkeypatch.setattr(sys, "argv", words)
    with mock.patch.dict(os.environ):
        runpy.run_path(str(ROOT / "examples" / "fsdp2.py"), run_name="__main__")
    assert re.search(r"Fast Forward: [3-9] stages up to step 18", capsys.readouterr().out)
