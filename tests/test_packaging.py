"""The wheel holds the package and its types, and runs where there is torch and nothing else."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastforward_optim

ROOT = Path(__file__).parent.parent
RUN = "import runpy, sys; sys.path += sys.argv[1:3]; runpy.run_path(sys.argv[3])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    package = "fastforward_optim"
    shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl"))


def test_it_holds_the_package_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name for name in names if name.endswith("METADATA"))
        metadata = archive.read(info).decode()
    top_level = {name.partition("/")[0] for name in names}
    version = fastforward_optim.__version__
    assert top_level == {"fastforward_optim", f"fastforward_optim-{version}.dist-info"}
    assert "fastforward_optim/py.typed" in names
    required = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.7"]
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE))
    assert extras >= {"peft", "transformers", "bench", "dev"}


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
