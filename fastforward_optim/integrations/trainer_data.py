"""Validation examples and batches of a trainer, as its ``evaluate`` prepares them.

Knows how the trainers prepare and load their data, and nothing of losses.
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

# Preparation may reduce the number of examples (packing, a filter by length). While there are too
# few, read this many times as many.
_READ_FACTOR = 4


class Examples:
    """The first examples of a validation set, prepared as the trainer prepares its own.

    Args:
        trainer: the trainer; its ``evaluate`` prepares the examples.
        data: a ``datasets.Dataset``, which remains one, or any sequence or iterable of examples,
            which becomes a list. An iterator is read only once.
        count: the number of examples wanted.
        name: name of the data set if there are several, since each may have its own loss.
        is_prepared: whether ``data`` is the trainer's ``eval_dataset``, which is prepared already.

    Raises:
        ValueError: the trainer cannot prepare the examples, or cannot make a batch of them.
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
                wanted *= _READ_FACTOR
        self.rows = first(self.rows, count)
        if len(raw) and not len(self.rows):
            raise ValueError(
                f"{type(trainer).__name__} leaves out all {len(raw)} examples in val_data_or_fn, "
                "as it does with too long ones: give it shorter ones, or raise its max_length"
            )

    def __len__(self) -> int:
        return len(self.rows)


class _Source:
    """Returns the first examples of a sequence or an iterable, any number of times."""

    def __init__(self, data: Any) -> None:
        self._data = data
        self._read: list[Any] = []  # examples taken from the iterator so far
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
    """Return up to ``count`` examples from ``start`` on: a ``Dataset`` if ``data`` is one."""
    places = range(start, min(start + count, len(data)))
    return data.select(places) if is_dataset(data) else [data[place] for place in places]


def is_dataset(data: Any) -> bool:
    """Return True if ``data`` is a ``datasets.Dataset``. Does not import ``datasets``."""
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(data, datasets.Dataset)


def _is_streamed(data: Any) -> bool:
    datasets = sys.modules.get("datasets")
    return datasets is not None and isinstance(data, datasets.IterableDataset)


def _dataset(rows: list[Any], features: Any = None) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows, features=features)


def _prepared(trainer: Any, examples: Any, name: str | None) -> Any:
    """Prepare the examples as the trainer's ``evaluate`` does.

    Raises:
        ValueError: the trainer's collator cannot make a batch of the examples in any form.
    """
    row = examples[0]
    if isinstance(row, Mapping) and "seq_lengths" in row:
        return examples  # the trainer has packed these, and would pack them again
    ways = [examples]
    if isinstance(examples, list) and "datasets" in sys.modules:
        ways.append(None)  # try a dataset too: trainers that prepare their data expect one
    for way in ways:
        try:
            rows = _as_evaluated(trainer, _dataset(examples) if way is None else way, name)
            _check_collator(trainer, rows)
            return rows
        except Exception as failure:
            error = failure
    # The examples may be prepared already. Not all trainers recognise that, and preparing them
    # again fails if their raw columns are gone.
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
    """Return True if an example has text or messages, and no tokens."""
    values = row.values() if isinstance(row, Mapping) else ()
    lists = [value for value in values if isinstance(value, list) and value]
    if any(isinstance(value[0], int) for value in lists):
        return False
    heads = [*values, *(value[0] for value in lists)]
    return any(isinstance(head, (str, Mapping)) for head in heads)


class _Found(BaseException):
    """Leaves ``evaluate`` once its data is prepared. ``except Exception`` does not catch it."""

    def __init__(self, data: Any) -> None:
        self.data = data


def _as_evaluated(trainer: Any, examples: Any, name: str | None) -> Any:
    """Return the data that ``evaluate`` passes to its loader.

    Calls ``evaluate({name: examples})`` if there is a name, and ``evaluate(examples)`` otherwise.
    """
    examples = _tokenized(trainer, examples)

    def get_eval_dataloader(eval_dataset: Any = None) -> Any:
        raise _Found(eval_dataset)

    nothing = SimpleNamespace(start=ignore, stop_and_update_metrics=ignore)
    kept = attributes_of(trainer)
    with replaced(
        trainer, get_eval_dataloader=get_eval_dataloader, log=ignore, _memory_tracker=nothing
    ):
        try:
            trainer.evaluate(examples if name is None else _by_name(name, examples))
        except _Found as found:
            # A user's own ``evaluate`` may measure the eval_dataset, whatever it is given.
            own = found.data is None or found.data is trainer.eval_dataset
            return examples if own else found.data
        finally:
            kept.put_back()
    return examples


def _by_name(name: str, examples: Any) -> Any:
    """Return a dict of data sets for ``evaluate``.

    Datasets go into a ``DatasetDict``, the only type that sentence-transformers accepts.
    """
    if is_dataset(examples):
        import datasets

        return datasets.DatasetDict({name: examples})
    return {name: examples}


def ignore(*args: Any, **kwargs: Any) -> None:
    """Replace a method that has side effects, and do nothing."""


def _tokenized(trainer: Any, examples: Any) -> Any:
    """Tokenize for the TRL trainers that do so in their constructor and not in ``evaluate``."""
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
    """Return the batches that ``trainer.evaluate(examples)`` would measure, all on each rank."""
    if not len(examples):
        return []
    size = trainer.args.eval_batch_size
    with _loaded_here(trainer, drop_last=len(examples) >= size):
        loader = trainer.get_eval_dataloader(examples)
        dataset = getattr(loader, "dataset", None)
        if _length(dataset) == len(examples):
            return list(loader)
    # The user's own loader has taken another data set. Use only its collator.
    parts = [first(examples, size, start) for start in range(0, len(examples), size)]
    return [loader.collate_fn([part[place] for place in range(len(part))]) for part in parts]


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


@contextmanager
def _loaded_here(trainer: Any, *, drop_last: bool) -> Iterator[None]:
    """Make loaders local to this process inside this context; the trainer keeps none of them.

    With persistent workers the trainer would keep the loader, and evaluate on our examples later.
    """
    args, accelerator = trainer.args, trainer.accelerator
    even = accelerator.even_batches  # sentence-transformers changes it
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
    """Save what a trainer counts and collects, to restore it later.

    That is its attributes, its state, and objects of classes from its own modules, but not its
    data sets, models, optimizer and arguments.
    """
    is_own = own_objects(trainer)

    def is_owner(value: Any) -> bool:
        return isinstance(value, (TrainerState, TrainerControl)) or (
            is_own(value) and not isinstance(value, TrainingArguments)
        )

    sets = trainer.eval_dataset
    sets = list(sets.values()) if isinstance(sets, Mapping) else [sets]
    return Attributes([trainer], is_owner, leave=[trainer.train_dataset, *sets])
