"""The wheel holds the package and its types; `make wheel` runs it where there is torch alone."""

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import fastforward_optim

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_the_package_and_no_more(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    package = "fastforward_optim"
    shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, source],
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        names = archive.namelist()
        info = next(name for name in names if name.endswith("METADATA"))
        metadata = archive.read(info).decode()
    top_level = {name.partition("/")[0] for name in names}
    version = fastforward_optim.__version__
    assert top_level == {"fastforward_optim", f"fastforward_optim-{version}.dist-info"}
    assert "fastforward_optim/py.typed" in names
    required = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.11"]
    extras = set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE))
    assert extras >= {"peft", "transformers", "bench", "dev"}
