"""Workflows, templates, Makefile and constraints agree with each other."""

import ast
import configparser
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
FILES = sorted([*GITHUB.rglob("*.yml"), ROOT / ".pre-commit-config.yaml"])
CONSTRAINTS = dict(
    re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
)


def commands(workflow):
    jobs = yaml.safe_load((GITHUB / "workflows" / workflow).read_text())["jobs"]
    return [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]


def test_they_are_yaml():
    assert all(isinstance(yaml.safe_load(path.read_text()), dict) for path in FILES)


def test_every_make_target_that_is_called_exists():
    callers = [*commands("ci.yml"), *commands("release.yml"), (ROOT / ".ci" / "run").read_text()]
    lines = [line for text in callers for line in text.splitlines()]
    called = {t for line in lines if line.startswith("make ") for t in line.split()[1:]}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"lint", "types", "test", "oldest", "wheel"} <= called
    if not (ROOT / "docs").is_dir():
        called -= {"docs"}
    assert called <= targets


def test_workflows_ask_for_no_more_than_reading():
    for path in (GITHUB / "workflows").iterdir():
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}


def test_ci_tests_the_versions_of_python_that_setup_names():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = re.findall(r"Python :: (3\.\d+)", setup["metadata"]["classifiers"])
    jobs = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())["jobs"]
    assert jobs["test"]["strategy"]["matrix"]["python"] == named
    assert setup["options"]["python_requires"] == f">={named[0]}"


def test_make_oldest_installs_the_lowest_versions_that_setup_allows():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = (setup["options"]["install_requires"] + extras["peft"] + extras["transformers"]).split()
    allowed = dict(line.split(">=") for line in lines)
    makefile = (ROOT / "Makefile").read_text()
    pins = re.findall(r"^OLDEST(?:_TORCH)? \??:?= (.+)$", makefile, re.MULTILINE)
    pinned = dict(pin.split("==") for pin in " ".join(pins).split())
    assert {name: version.rpartition(".")[0] for name, version in pinned.items()} == allowed


def test_constraints_have_no_duplicates_and_pin_what_runs_here():
    text = (ROOT / "constraints.txt").read_text()
    names = re.findall(r"^([\w.-]+)==", text, re.MULTILINE)
    counts = Counter(re.sub(r"[-_.]+", "-", name).lower() for name in names)
    assert [name for name, count in counts.items() if count > 1] == []
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.split()[1] == CONSTRAINTS["ruff"]


def test_ruff_is_pinned_in_one_place():
    """pre-commit takes it from the environment; a ``rev`` of its own would have to agree."""
    for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]:
        if "ruff" in repo["repo"]:
            assert repo["rev"] == f"v{CONSTRAINTS['ruff']}"


def test_the_bug_form_asks_for_the_doctor():
    form = (GITHUB / "ISSUE_TEMPLATE" / "bug.yml").read_text()
    assert "python -m fastforward_optim doctor --json" in form


# What each call must say, word for word, wherever it is: nothing that is loaded may run.
SAFE = {
    "torch.load": {"weights_only": "True"},
    "from_pretrained": {"use_safetensors": "True", "trust_remote_code": "False"},
    "load_dataset": {},  # datasets 4, which setup.cfg asks for, has no scripts any more
}
# A tokenizer has no weights; a GGUF file is no pickle.
WITHOUT_WEIGHTS = ("AutoTokenizer", "AutoConfig")


def calls(source):
    """Calls that load what others may have written, as (what, owner, keywords)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = ast.unparse(node.func.value)
            name = f"{owner}.{node.func.attr}" if owner == "torch" else node.func.attr
            if name in SAFE:
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                yield name, owner, keywords


def unsafe_calls(source):
    for name, owner, keywords in calls(source):
        wanted = dict(SAFE[name])
        if owner.endswith(WITHOUT_WEIGHTS):
            wanted.pop("use_safetensors", None)
        if any(keywords.get(word) != value for word, value in wanted.items()):
            yield f"{owner}: {name} needs {wanted}, has {keywords}"
        if keywords.get("trust_remote_code", "False") != "False":
            yield f"{owner}: {name} runs code"
    for word in ("pickle.load", "import dill", "joblib.load", "add_safe_globals"):
        if word in source:
            yield word


SOURCES = sorted(
    path
    for top in ("fastforward_optim", "benchmarks", "examples")
    for path in ROOT.glob(f"{top}/**/*.py")
)


def test_nothing_that_is_loaded_is_run():
    assert [(path, found) for path in SOURCES for found in unsafe_calls(path.read_text())] == []


def test_torch_loads_weights_only_in_tests_and_documents_too():
    found = 0
    for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]:
        text = path.read_text()
        for match in re.finditer(r"torch\.load\(([^()]|\([^()]*\))*\)", text):
            if path.name in ("test_project.py", "test_checkpoint_file.py"):
                continue  # which try what happens without
            assert "weights_only=True" in match[0], (path, match[0])
            found += 1
    assert found > 5


def test_a_call_that_could_run_code_is_found():
    for wrong in (
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "AutoModel.from_pretrained(x, use_safetensors=True)",
        "AutoModel.from_pretrained(x, trust_remote_code=False)",
        "AutoTokenizer.from_pretrained(x)",
        "AutoTokenizer.from_pretrained(**source)",
        "datasets.load_dataset(x, trust_remote_code=True)",
        "pickle.load(file)",
    ):
        assert list(unsafe_calls(wrong)), wrong
    right = "AutoModel.from_pretrained(x, use_safetensors=True, trust_remote_code=False)"
    assert list(unsafe_calls(right)) == []
    assert sum(len(list(calls(path.read_text()))) for path in SOURCES) >= 7
