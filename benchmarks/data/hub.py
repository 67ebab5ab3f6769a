"""The paper's data sets as tasks, from the Hugging Face hub or from a local copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .tasks import Document, Message, Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Row = Mapping[str, Any]


def _guideline(row: Row) -> Document:
    text = row["clean_text"]
    return "" if _blank(text) else text


def _instruction(row: Row) -> Document:
    request = {"role": "user", "content": row["instruction"]}
    return _conversation([request, {"role": "assistant", "content": row["response"]}])


def _chat(row: Row) -> Document:
    return _conversation(row["messages"] or [])


def _conversation(messages: Sequence[Message]) -> list[Message]:
    """Keep role and content of each turn; drop conversations with a blank turn or no answer."""
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    roles = {turn["role"] for turn in turns}
    if not roles <= {"user", "assistant"}:
        raise ValueError(f"unexpected roles {roles}")
    blank = any(_blank(turn["content"]) for turn in turns)
    return turns if "assistant" in roles and not blank else []


def _blank(text: str | None) -> bool:
    return text is None or not text.strip()


class Source(NamedTuple):
    """A data set of the hub, and how to read it.

    ``fields`` describes the fields that are read, and ``held_out`` is the number of documents that
    the paper holds out. Split names are those of the hub, then those that ``datasets`` gives to
    local files.
    """

    repo: str
    licence: str
    fields: dict[str, str]
    document: Callable[[Row], Document]
    held_out: int
    splits: tuple[str, ...] = ("train",)
    held_out_splits: tuple[str, ...] = ()


SOURCES = {
    "medical": Source(
        repo="epfl-llm/guidelines",
        licence="Common Crawl licence, as its card has it; the guidelines' own terms apply",
        fields={"clean_text": "text"},
        document=_guideline,
        held_out=1032,
    ),
    "instruction": Source(
        repo="ise-uiuc/Magicoder-Evol-Instruct-110K",
        licence="Apache-2.0 licence",
        fields={"instruction": "text", "response": "text"},
        document=_instruction,
        held_out=1000,
    ),
    "chat": Source(
        repo="HuggingFaceH4/ultrachat_200k",
        licence="MIT licence",
        fields={"messages": "a list of turns with role (user or assistant) and content"},
        document=_chat,
        held_out=1032,
        splits=("train_sft", "train"),
        held_out_splits=("test_sft", "test"),
    ),
}


def hub_task(name: str, path: str | None = None, *, held_out: int | None = None) -> Task:
    """Make a task of the paper from the paper's own data set.

    Chat holds out the first rows of the data set's test split. The other data sets have a single
    split, and the paper does not say which of its documents it holds out: they are drawn by
    ``datasets.Dataset.train_test_split`` with seed 0, the same for every seed of a run. A local
    copy of chat without a test split is treated in the same way.

    ``datasets`` downloads the whole data set on first use and keeps it in its cache on disk, from
    which each document is read when it is needed.

    Args:
        name: medical, instruction or chat.
        path: a JSON lines or Parquet file with the fields of the data set, or a folder of such
            files, such as a downloaded copy of the repository; None for the hub.
        held_out: the number of documents to hold out; None for the paper's number.

    Returns:
        A task. Reading its documents raises SystemExit, with a message of one line, if the package
        ``datasets`` is missing, or the data set cannot be found or reached, has other fields, or
        has too few documents.
    """
    source = SOURCES[name]
    count = source.held_out if held_out is None else held_out

    @functools.cache
    def parts() -> tuple[Rows, Rows]:
        return _read(source, path, count)

    credit = f"{source.repo} ({source.licence}, https://huggingface.co/datasets/{source.repo})"
    return Task(
        name=name,
        documents=lambda: parts()[0],
        source=credit if path is None else f"{Path(path).name}, in place of {credit}",
        held_out=lambda: parts()[1],
    )


class Rows(Sequence[Document]):
    """The rows of a data set as documents, each read when it is needed."""

    def __init__(self, dataset: Dataset, source: Source, where: str) -> None:
        self._dataset = dataset
        self._source = source
        self._where = where

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        """Return the document at an index, or a slice without reading its documents."""
        if isinstance(index, slice):
            chosen = self._dataset.select(range(*index.indices(len(self))))
            return Rows(chosen, self._source, self._where)
        row = self._dataset[index]
        try:
            return self._source.document(row)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            form = ", ".join(f"{field}: {what}" for field, what in self._source.fields.items())
            raise SystemExit(f"{self._where} has rows that do not have the form {form}") from error


def _read(source: Source, path: str | None, count: int) -> tuple[Rows, Rows]:
    """Return the documents to train on and those held out."""
    where = source.repo if path is None else path
    found = _load(source.repo, path)

    def split(names: tuple[str, ...]) -> Dataset | None:
        name = next((name for name in names if name in found), None)
        return name and _only(source.fields, found[name], where)

    train, held_out = split(source.splits), split(source.held_out_splits)
    if train is None:
        raise SystemExit(f"{where} has no split {source.splits[0]}, only {', '.join(found)}")
    if held_out is None:
        if len(train) <= count:
            raise SystemExit(f"{where} has {len(train)} documents, too few to hold out {count}")
        parts = train.train_test_split(test_size=count, seed=0)
        train, held_out = parts["train"], parts["test"]
    elif len(held_out) < count:
        raise SystemExit(f"{where} has {len(held_out)} documents held out, fewer than {count}")
    return Rows(train, source, where), Rows(held_out.select(range(count)), source, where)


def _only(fields: Iterable[str], dataset: Dataset, where: str) -> Dataset:
    """Select the fields that documents need; others would be decoded with every row."""
    for field in fields:
        if field not in dataset.column_names:
            known = ", ".join(dataset.column_names)
            raise SystemExit(f"{where} has no field {field}, only {known}")
    return dataset.select_columns(list(fields))


FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}


def _load(repo: str, path: str | None) -> DatasetDict:
    try:
        import datasets
    except ImportError:
        raise SystemExit("the package datasets is missing: run `pip install datasets`") from None
    local = "a local JSON lines or Parquet file, or a folder of such files"
    try:
        if path is None:
            return datasets.load_dataset(repo)
        if Path(path).is_dir():
            return datasets.load_dataset(str(Path(path).resolve()))
        if not Path(path).exists() or Path(path).suffix not in FORMATS:
            raise SystemExit(f"{path} is not {local}")
        return datasets.load_dataset(FORMATS[Path(path).suffix], data_files=str(path))
    except ConnectionError:
        raise SystemExit(
            f"{repo} is not in the cache, and the Hugging Face hub cannot be reached:"
            f" go online (with HF_HUB_OFFLINE=0 if it is set), or pass {local}"
        ) from None
    except datasets.exceptions.DatasetNotFoundError as error:
        raise SystemExit(
            f"{_first_line(error)} Run `hf auth login` if you have access to it, or pass {local}"
        ) from error
    # The errors of datasets, pyarrow and the hub's client have no common base class.
    except Exception as error:
        reason = _first_line(error.__cause__ or error) or "it is empty"
        raise SystemExit(f"{path or repo} cannot be read: {reason}") from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


HUB_TASKS = {name: hub_task(name) for name in SOURCES}
