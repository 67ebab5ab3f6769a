"""Validation examples and batches of a trainer, as its ``evaluate`` would have them.

Knows how the trainers prepare their data and load it; nothing of losses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import islice
from types import SimpleNamespace
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from ..random_state import randomness_kept
from .attributes import Attributes, own_objects, replaced

# Of examples that become fewer when they are prepared (packed, or filtered by their length), so
# many times as many are read, until there are enough.
_MORE = 4


class Examples:
    """The first examples of a validation set, prepared as the trainer prepares its own.

    Args:
        trainer: whose ``evaluate`` prepares them.
        data: a dataset of ``datasets``, which stays one, or anything that gives examples, of which
            there is a list; what can be read only once is read once.
        count: how many are wanted.
        name: of the data set, where there are several, each with a loss of its own perhaps.
        is_prepared: they are the trainer's ``eval_dataset``, which it has prepared itself.

    Raises:
        ValueError: the trainer cannot prepare the examples, or make a batch of them.
    """

    def __init__(
        self,
        trainer: Any,
        data: Any,
        count: int,
        *,
        name: str | None = None,
        is_prepared: bool = False,
    ) -> None:
        source, wanted = _Source(data), count
        with randomness_kept(trainer.args.device):
            while True:
                raw = source.first(wanted)
                self.rows = raw if is_prepared or not len(raw) else _prepared(trainer, raw, name)
                if len(raw) < wanted or len(self.rows) >= count:
                    break
                wanted *= _MORE
        self.rows = first(self.rows, count)
        if len(raw) and not len(self.rows):
            raise ValueError(
                f"{type(trainer).__name__} leaves out all {len(raw)} examples in val_data_or_fn, "
                "as it does with too long ones: give it shorter ones, or raise its max_length"
            )

    def __len__(self) -> int:
        return len(self.rows)


class _Source:
    """Gives the first examples of anything that has some, as often as it is asked."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self._read: list[Any] = []  # of what can be read only once
        self._iterator: Iterator[Any] | None = None

    def first(self, count: int) -> Any:
        data = self._data
        if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
            return first(data, count)
        if self._iterator is None:
            self._iterator = iter(data)
        self._read += islice(self._iterator, count - len(self._read))
        features = getattr(data, "features", None) if _is_streamed(data) else None
        return _dataset(self._read, features) if features else list(self._read)


def first(data: Any, count: int, start: int = 0) -> Any:
    """Examples from ``start`` on: of a dataset a dataset, of anything else a list."""
    places = range(start, min(start + count, len(data)))
    return data.select(places) if is_dataset(data) else [data[place] for place in places]


def is_dataset(data: Any) -> bool:
    """Whether this is a ``datasets.Dataset``, without importing that."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(data, datasets.Dataset)


def _is_streamed(data: Any) -> bool:
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(data, datasets.IterableDataset)


def _dataset(rows: list[Any], features: Any = None) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows, features=features)


def _prepared(trainer: Any, examples: Any, name: str | None) -> Any:
    """What the trainer's ``evaluate`` makes of the examples, if its collator takes that."""
    row = examples[0]
    if isinstance(row, Mapping) and "seq_lengths" in row:
        return examples  # packed by the trainer, which would pack them once more
    ways = [examples]
    if isinstance(examples, list) and "datasets" in sys.modules:
        ways.append(None)  # a dataset of them, which is what a trainer that prepares takes
    for way in ways:
        try:
            rows = _as_evaluated(trainer, _dataset(examples) if way is None else way, name)
            _check_collator(trainer, rows)
            return rows
        except Exception as failure:
            error = failure
    # Prepared ones, which not all trainers know as such: their raw columns may be gone.
    if not _is_raw(row):
        with suppress(Exception):
            _check_collator(trainer, examples)
            return examples
    columns = f" of {list(row)}" if isinstance(row, Mapping) else ""
    columns += "" if name is None else f" ({name!r})"
    raise ValueError(
        f"{type(trainer).__name__} cannot make a validation batch of the examples in "
        f"val_data_or_fn{columns} ({type(error).__name__}: {error}): pass what "
        "trainer.evaluate(...) takes, such as a Dataset with the columns of train_dataset, or a "
        "function without arguments that returns the loss"
    ) from error


def _check_collator(trainer: Any, rows: Any) -> None:
    batches_of(trainer, first(rows, trainer.args.eval_batch_size))


def _is_raw(row: Any) -> bool:
    """Whether there is text, or messages, in an example, and no tokens."""
    values = row.values() if isinstance(row, Mapping) else ()
    lists = [value for value in values if isinstance(value, list) and value]
    if any(isinstance(value[0], int) for value in lists):
        return False
    heads = [*values, *(value[0] for value in lists)]
    return any(isinstance(head, (str, Mapping)) for head in heads)


class _Found(BaseException):
    """Ends ``evaluate`` where it has prepared its data; no ``except Exception`` stops it."""

    def __init__(self, data: Any) -> None:
        self.data = data


def _as_evaluated(trainer: Any, examples: Any, name: str | None) -> Any:
    """The data that ``evaluate(examples)``, or one of ``{name: examples}``, makes a loader of."""
    examples = _tokenized(trainer, examples)

    def get_eval_dataloader(eval_dataset: Any = None) -> Any:
        raise _Found(eval_dataset)

    nothing = SimpleNamespace(start=ignore, stop_and_update_metrics=ignore)
    kept = attributes_of(trainer)
    with replaced(
        trainer, get_eval_dataloader=get_eval_dataloader, log=ignore, _memory_tracker=nothing
    ):
        try:
            trainer.evaluate(examples if name is None else _named(name, examples))
        except _Found as found:
            # An ``evaluate`` of the user's may measure the eval_dataset, whatever it is given.
            own = found.data is None or found.data is trainer.eval_dataset
            return examples if own else found.data
        finally:
            kept.put_back()
    return examples


def _named(name: str, examples: Any) -> Any:
    """What ``evaluate`` takes for several data sets: sentence-transformers knows one type alone."""
    if is_dataset(examples):
        import datasets

        return datasets.DatasetDict({name: examples})
    return {name: examples}


def ignore(*args: Any, **kwargs: Any) -> None:
    """In the place of what would leave a trace."""


def _tokenized(trainer: Any, examples: Any) -> Any:
    """For the trainers of TRL that tokenize where they are constructed, and not in ``evaluate``."""
    row = examples[0]
    if not hasattr(trainer, "tokenize_row") or "chosen_labels" in row:
        return examples
    from trl.data_utils import maybe_apply_chat_template, maybe_extract_prompt

    rows = []
    for row in examples:
        row = {**row, **maybe_extract_prompt(dict(row))}
        row = {**row, **maybe_apply_chat_template(row, trainer.processing_class)}
        rows.append({**row, **trainer.tokenize_row(row)})
    return _dataset(rows) if is_dataset(examples) else rows


def batches_of(trainer: Any, examples: Any) -> list[Any]:
    """The batches in which ``trainer.evaluate(examples)`` would measure them, all on each rank."""
    if not len(examples):
        return []
    size = trainer.args.eval_batch_size
    with _loaded_here(trainer, drop_last=len(examples) >= size):
        loader = trainer.get_eval_dataloader(examples)
        dataset = getattr(loader, "dataset", None)
        if _length(dataset) == len(examples):
            return list(loader)
    # A loader of the user's own, which has taken another set: its collator alone.
    parts = [first(examples, size, start) for start in range(0, len(examples), size)]
    return [loader.collate_fn([part[place] for place in range(len(part))]) for part in parts]


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


@contextmanager
def _loaded_here(trainer: Any, *, drop_last: bool) -> Iterator[None]:
    """Context in which loaders are of this process alone, and the trainer keeps none of them.

    With persistent workers it would keep one, and evaluate on our examples from then on.
    """
    args, accelerator = trainer.args, trainer.accelerator
    even = accelerator.even_batches  # which sentence-transformers changes
    here = {
        "dataloader_num_workers": 0,
        "dataloader_prefetch_factor": None,
        "dataloader_persistent_workers": False,
        "dataloader_multiprocessing_context": None,
        "dataloader_pin_memory": False,
        "dataloader_drop_last": args.dataloader_drop_last and drop_last,
    }
    try:
        with replaced(args, **here), replaced(accelerator, prepare=lambda loader: loader):
            yield
    finally:
        accelerator.even_batches = even


def attributes_of(trainer: Any) -> Attributes:
    """What a trainer counts and gathers: its attributes, its state, and objects of its own modules.

    Not its data sets, models, optimizer and arguments.
    """
    is_own = own_objects(trainer)

    def is_owner(value: Any) -> bool:
        return isinstance(value, (TrainerState, TrainerControl)) or (
            is_own(value) and not isinstance(value, TrainingArguments)
        )

    sets = trainer.eval_dataset
    sets = list(sets.values()) if isinstance(sets, Mapping) else [sets]
    return Attributes([trainer], is_owner, leave=[trainer.train_dataset, *sets])
