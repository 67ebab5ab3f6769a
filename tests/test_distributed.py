"""What several processes promise: each check runs on every rank, under torch's own launcher."""

import pytest

from .distributed.launch import launch, names

MODULES = ["agreement"]


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size} ranks")
def failures(request, tmp_path_factory):
    return launch(request.param, tmp_path_factory.mktemp("ranks") / "failures.json", MODULES)


@pytest.mark.parametrize("check", [name for module in MODULES for name in names(module)])
def test_on_several_ranks(failures, check):
    assert not failures[check], "\n".join(failures[check])
