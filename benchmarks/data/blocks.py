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
"""The label of a token that no loss is taken on, as in torch and transformers."""


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
