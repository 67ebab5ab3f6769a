"""The mutation tests (``make mutants``): a pytest plugin that makes them quick, and their table.

Knows mutmut's files: ``mutmut-stats.json`` with the seconds that each test took, and for each
module a ``.meta`` with the exit code of each mutant's tests.
"""

import gc
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

LEAST_KILLED = 0.9
# Exit codes of pytest (a failure, an internal error) and of a process that ran out of time.
KILLED = {1, 3}
TIMEOUT = {-24, 24, 152}


def pytest_collection_modifyitems(items):
    """Most mutants fail in most tests: quick ones first, and one case of each before the others."""
    for item in items:
        if "\\" in item.nodeid:  # mutmut passes the names on, and pytest would not find this one
            raise pytest.UsageError(f"{item.nodeid} has a backslash in its name; give it an id")
    stats = Path("mutmut-stats.json")  # from mutmut's first run of the tests
    if not stats.exists():
        return
    seconds = json.loads(stats.read_text())["duration_by_test"]
    seen = Counter()

    def rank(item):
        took = seconds.get(item.nodeid, 0.0)
        function = item.nodeid.partition("[")[0]
        seen[function] += 1
        return took > 0.1, seen[function] > 1, took

    items.sort(key=rank)


def pytest_sessionfinish(session):
    """What is imported before the fork stays out of the garbage collections after it."""
    if session.config.option.collectonly:
        gc.collect()
        gc.freeze()


def main():
    """Print how many mutants of each file were killed; fail if it were too few."""
    total = Counter()
    print(f"{'file':16} mutants killed timeout survived  score")
    for path in sorted(Path("mutants/fastforward_optim").rglob("*.meta")):
        codes = json.loads(path.read_text())["exit_code_by_key"].values()
        counts = Counter(map(status, codes))
        total += counts
        print_row(path.name.removesuffix(".meta"), counts)
    print_row("all", total)
    return killed(total) < LEAST_KILLED * total.total()


def status(code):
    return "killed" if code in KILLED else "timeout" if code in TIMEOUT else "survived"


def killed(counts):
    return counts["killed"] + counts["timeout"]


def print_row(name, counts):
    mutants, score = counts.total(), killed(counts) / counts.total()
    numbers = f"{counts['killed']:6} {counts['timeout']:7} {counts['survived']:8}"
    print(f"{name:16} {mutants:7} {numbers} {score:6.1%}")


if __name__ == "__main__":
    sys.exit(main())
