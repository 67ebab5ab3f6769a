"""Blocks of tokens: documents split into three sets, tokenized and packed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tasks import Document, Task

IGNORED = -100
"""The label of tokens that the loss ignores, as in torch and transformers."""


class Blocks(NamedTuple):
    """Packed tokens.

    Both tensors are int64, of shape (number of blocks, block length). The label is -100 where the
    loss ignores the token.
    """

    input_ids: Tensor
    labels: Tensor

    @property
    def rows(self) -> int:
        """The number of blocks; ``len`` is 2, that of the tuple."""
        return len(self.input_ids)

    def select(self, index: slice | Tensor) -> Blocks:
        """Select blocks by a slice or a tensor of indices."""
        return Blocks(self.input_ids[index], self.labels[index])

    def split(self, size: int) -> list[Blocks]:
        """Split into parts of ``size`` blocks; the last part may be smaller."""
        return [
            Blocks(*part)
            for part in zip(self.input_ids.split(size), self.labels.split(size), strict=True)
        ]

    def batch(self, device: torch.device | str) -> dict[str, Tensor]:
        """Return the blocks as keyword arguments of a causal language model."""
        return {"input_ids": self.input_ids.to(device), "labels": self.labels.to(device)}

    @classmethod
    def cat(cls, a: Blocks, b: Blocks) -> Blocks:
        """Concatenate the blocks of ``a`` and ``b``."""
        return cls(torch.cat((a.input_ids, b.input_ids)), torch.cat((a.labels, b.labels)))


class Splits(NamedTuple):
    """Blocks of three disjoint sets of documents."""

    train: Blocks
    validation: Blocks
    test: Blocks


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
    """Shuffle the documents, assign each to one split, and pack each split into full blocks.

    If the source holds documents out, the first of them make the validation blocks and the next
    the test blocks, in their own order whatever the seed; all other documents are for training.
    Only as many training documents are read as the blocks need.

    Documents follow each other without padding, so that all blocks cost the same. A plain text
    ends with the end-of-text token. A conversation is formatted with the tokenizer's chat template
    (``PLAIN_TEMPLATE`` if it has none) and an empty system message. Blocks without a token to
    predict are dropped.

    Args:
        task: the source of the documents.
        tokenizer: a tokenizer of transformers.
        block: tokens in a block.
        validation: blocks for the stages to measure; the paper has 32 examples.
        test: blocks that only the report uses.
        train: the most blocks to train on; None for all that are left.
        seed: of the shuffle.

    Raises:
        SystemExit: a package is missing, or the task has too few documents.
    """
    documents = task.documents()
    # Shuffle indices: the documents themselves may not fit in memory.
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
        # Compare contents: public data sets have duplicates.
        unique = {repr(document): document for document in task.held_out()}
        held_out = _tokenized(unique.values(), tokenizer)
        validation_blocks = take(held_out, validation, validation)
        test_blocks = take(held_out, test, test)
        others = (document for document in shuffled if repr(document) not in unique)
        stream = _tokenized(others, tokenizer)
    return Splits(take(stream, train, least=1), validation_blocks, test_blocks)


def _packed(stream: Iterator[tuple[list[int], list[int]]], block: int, most: int | None) -> Blocks:
    """Pack documents from the stream into full blocks; tokens that do not fill one are dropped."""
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
    """Yield tokens and labels of each document, read lazily and tokenized in batches."""
    nonempty = (document for document in documents if document)
    while batch := list(itertools.islice(nonempty, 256)):
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
"""Stands for an answer while the template is applied: a noncharacter, which no text contains."""


PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n"
    "{% endif %}{% endfor %}"
)
"""A shortened Zephyr template, for tokenizers without one, such as those of base models."""


def _pieces(document: Document, tokenizer: Any) -> list[tuple[str, bool]]:
    """Split a document into pairs (text, whether the loss counts it).

    In a conversation the loss counts the answers, each with the end-of-turn token that the model
    has to generate, but not the header before it, which is part of the prompt. The text is split
    before tokenizing, so that an answer has the tokens that a model would generate for it.
    """
    if isinstance(document, str):
        return [(document, True)]
    answers = [message["content"] for message in document if message["role"] == "assistant"]
    # Without a system message, SmolLM2's template inserts a default one of 20 tokens.
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
