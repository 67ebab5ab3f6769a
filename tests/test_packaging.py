"""The wheel runs where there is torch and nothing else; the source distribution holds all."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import fastforward_optim

ROOT = Path(__file__).parent.parent
RUN = "import runpy, sys; sys.path += sys.argv[1:3]; runpy.run_path(sys.argv[3])"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source, the source distribution, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("built")
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    shutil.copytree(ROOT, out / "source", ignore=shutil.ignore_patterns(".git", *ignored))
    source = {str(path.relative_to(out / "source")) for path in files(out / "source")}
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, out / "source"],
        check=True,
        capture_output=True,
    )
    return source, next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture
def wheel(built):
    return built[2]


def test_the_source_distribution_can_run_its_tests_since_it_holds_everything(built):
    source, path, _ = built
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert sorted(source - held) == []


def test_the_wheel_holds_the_package_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top_level = {name.partition("/")[0] for name in names}
    version = fastforward_optim.__version__
    assert top_level == {"fastforward_optim", f"fastforward_optim-{version}.dist-info"}
    assert "fastforward_optim/py.typed" in names


def test_it_needs_torch_alone_and_its_description_links_to_no_file(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith("METADATA"))
        metadata = archive.read(info).decode()
    required = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.7"]
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE))
    assert extras >= {"peft", "transformers", "bench", "dev"}
    assert "How a stage works (`docs/how-it-works.md`)" in metadata
    assert re.findall(r"\]\((?!https?:).*", metadata) == []


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fastforward_optim.__version__


def closure(distribution):
    """A distribution and what it needs, as names of distributions that are installed."""
    found, pending = set(), [distribution]
    while pending:
        name = re.split(r"[ ;<>=!~\[(]", pending.pop())[0].lower().replace("_", "-")
        if name in found:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        pending += [line for line in required if "extra ==" not in line]
    return found


@pytest.mark.skipif(os.name != "posix", reason="needs links to folders")
def test_it_runs_with_torch_alone(wheel, tmp_path):
    """In an environment made of links to the installed torch and what torch needs."""
    unpacked, site = tmp_path / "wheel", tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    site.mkdir()
    for name in closure("torch"):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (site / top).exists():  # the parts of CUDA share one folder
                (site / top).symlink_to(distribution.locate_file(top))
    assert not (site / "numpy").exists()
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", RUN, unpacked, site, ROOT / "tests" / "torch_alone.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert re.match(r"fastforward_optim .*: ok", result.stdout)
