"""The wheel holds the package alone, the source distribution all; `make wheel` runs the wheel."""

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


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source, the source distribution, and the wheel that is built from it."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs git, which knows what belongs to the source")
    out = tmp_path_factory.mktemp("built")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listing, cwd=ROOT, text=True).split("\0")
    source = {name for name in names if (ROOT / name).is_file()}
    for name in source:
        copy = out / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy)
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, out / "source"],
        check=True,
        capture_output=True,
    )
    return source, next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


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
