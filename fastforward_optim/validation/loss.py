"""``ValidationLoss``: a ``val_fn`` from a model and a few batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..arguments import check_integer, check_process_group
from ..random_state import random_state_kept
from ..saved_numbers import shortened
from ..search.evidence import Measurement, Rows
from ..stage.sharded import is_sharded
from .base import ValidationFunction
from .batches import (
    IGNORED,
    check_batches,
    describe,
    device_of,
    digest,
    map_tensors,
    number_of_labels,
    to_device,
)
from .batches import group_by_length as group_batches
from .cuda_graphs import CudaGraphs
from .eval_mode import EvalMode
from .row_losses import RowLosses

Forward = Callable[[nn.Module, Any], tuple[Any, ...]]

# A forward on a CPU takes about a second if the number of parameters times the number of elements
# in the batch is this.
_CHEAP = 2 * 10**10


class _Split(NamedTuple):
    """This rank's share of a stage's batches. ``forwards`` is None if no other ranks take part."""

    rank: int = 0
    size: int = 1
    forwards: int | None = None


class _Measured(NamedTuple):
    """A batch's mean loss and weight, and, if known, the sums of losses and weights of its rows.

    Holds numbers and tensors on the device; after ``_to_host``, numbers and lists.
    """

    loss: Any
    weight: Any  # None if the forward does not return it
    rows: Any = None


class ValidationLoss(ValidationFunction):
    """Mean loss per label over a few batches, in eval mode: a ``val_fn`` for ``FastForward``.

    Each batch's loss is weighted by the number of labels that it averages over, so any split into
    batches gives the loss of one large batch. If the model returns the sum over its labels, and
    the sum can be told from the mean, it is divided by their number. All labels other than -100
    count, except that a causal language model makes no prediction for the first label of each row.
    The model itself shows whether it skips first labels: if the answer matters, the first call runs
    one more forward of one batch.

    :meth:`measure` also returns the losses of the rows, so that two measurements can be compared
    example by example. They are computed from the logits of the same forwards, if the output has
    logits and the loss is the mean of cross-entropies, of squared errors or of binary
    cross-entropies; the first measured batch decides which. Otherwise losses are compared batch by
    batch.

    A call costs one forward of each batch and one synchronisation with the device. For the losses
    of the rows the log-probabilities are computed once more, in at most 128 MiB, or as much as the
    logits of one row take in float32. Every module's train or eval mode is restored afterwards, or
    at the end of the stage.

    If several ranks run a stage together, each measures its share of the batches, which shortens a
    trial accordingly, and ``FastForward`` takes the mean. Ranks with different batches (from a
    ``DistributedSampler``, for example) measure all of their own. A call outside a stage involves
    only this rank and measures all of its batches.

    Args:
        model: called as ``model(**batch)``; its output must have a ``loss``, the mean over the
            batch's labels. Batches without ``labels`` are weighted by their first dimension.
        batches: mappings from argument names to tensors, for instance a ``DataLoader``. They are
            read once, by the constructor, and kept on the model's device (without a copy if they
            are already there). Use examples that you neither train nor report on; the paper uses
            32.
        batches_per_stage: how many batches one stage measures. All trials of a stage measure the
            same batches, the next stage takes the next ones, and after the last batch it starts
            over. Default: all batches. Many stages in a row cannot overfit fresh examples, which
            cost no more: pass eight times as many, and use an eighth of them in each stage. With
            ``calibrate_lr`` the probe measures the first batches and all checks the next ones.
        autocast: dtype for ``torch.autocast`` in the forward; use the one you train with. None
            leaves autocasting as it is where ``val_fn`` is called.
        forward: for other models: ``forward(model, batch) -> (loss, weight)``, where ``loss`` is
            the batch's mean loss and ``weight`` the number of labels, each a number or a tensor of
            one element. Batches may then be of any type. An optional third value,
            ``(sums, weights)``, two tensors of shape (rows,), gives each row's sum of losses and
            number of labels.
        group_by_length: reduce padding: the constructor regroups the rows of each stage's batches
            by length. The loss is the same up to rounding. Each batch needs an ``attention_mask``;
            every other value must have one entry per row, or one per token if it has the mask's
            shape in all batches.
        cuda_graphs: on a GPU, record each forward as a CUDA graph and replay it. This is faster
            for small models and small batches, whose kernels take longer to launch than to run.
            Batches of one shape share a graph. The first two calls measure without the graph, and
            the second compares it. Values that are not tensors, such as a LoRA scaling, keep the
            value they had when the graph was recorded, hooks are not called again, and tensors that
            do not belong to the model must stay in place. The memory of a forward stays allocated.
            No effect on a CPU, or if several ranks run a stage together.
        process_group: the ranks among which a stage's batches are split. Default: all ranks that
            run the stage. With tensor parallelism, where several ranks compute each batch together,
            pass the data-parallel group (``mesh["dp"].get_group()``). False: each rank measures all
            batches.

    Raises:
        ValueError: there are no batches, no label counts, or there are fewer batches than
            ``batches_per_stage``.
        TypeError: a batch is not a mapping and there is no ``forward``.

    Examples:
        >>> val_fn = ValidationLoss(model, DataLoader(val_set, batch_size=16, collate_fn=collate))
        >>> optimizer = FastForward(AdamW(lora_parameters(model)), val_fn)
    """

    # False in subclasses whose trainer is not ready yet; they are tried when training begins.
    _is_tried_at_once = True

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        batches_per_stage: int | None = None,
        autocast: torch.dtype | None = None,
        forward: Forward | None = None,
        group_by_length: bool = False,
        cuda_graphs: bool = False,
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if forward is not None and not callable(forward):
            raise TypeError(
                f"forward must be a function of (model, batch), got {type(forward).__name__}"
            )
        if autocast is not None and not isinstance(autocast, torch.dtype):
            raise TypeError(
                f"autocast must be a torch.dtype such as torch.bfloat16, or None, got {autocast!r}"
            )
        if not isinstance(batches, Iterable):
            raise TypeError(f"batches must be an iterable of batches, got {batches!r}")
        if isinstance(batches, Mapping):
            raise TypeError(
                "batches must be an iterable of batches, got one mapping; pass [batch] for one"
            )
        self.model = model
        self.autocast = autocast
        self.forward = forward
        self.process_group = check_process_group(process_group)
        self._split = _Split()
        self._digest: bytes | None = None  # digest of the batches, once computed
        self.batches = [to_device(batch, device_of(model)) for batch in batches]
        if not self.batches:
            raise ValueError(
                "batches is empty; pass at least one batch (a generator or an iterator can be read "
                "only once: pass a list or a DataLoader)"
            )
        if batches_per_stage is not None:
            check_integer(
                "batches_per_stage", batches_per_stage, at_least=1, unit="a number of batches"
            )
            if batches_per_stage > len(self.batches):
                raise ValueError(
                    f"batches_per_stage is {batches_per_stage}, but there are only "
                    f"{len(self.batches)} batches; pass more or smaller batches"
                )
        self.batches_per_stage = batches_per_stage or len(self.batches)
        self._stages = 0
        if forward is None:
            check_batches(self.batches)
        if group_by_length:
            if forward is not None:
                raise ValueError(
                    "group_by_length does not know what batches of a forward of your own are; "
                    "group them yourself"
                )
            self.batches = group_batches(self.batches, self.batches_per_stage)
        self._graphs = CudaGraphs(model) if cuda_graphs else None
        self._mode: EvalMode | None = None  # set during a measurement
        # Labels that count in each batch. Computed at the first call, since it may take a forward.
        self._weights: list[int] | None = None
        self._row_losses: RowLosses | None = None
        self._tried = False
        if self._is_tried_at_once and self._is_cheap():
            self.check()

    def check(self) -> bool:
        """Try the forward of the first batch, once, without side effects.

        The constructor calls this. If the forward may take long (a large model that is still on
        the CPU), or all ranks must take part in it (a sharded model), ``FastForward`` calls it
        before the first step instead.

        Raises:
            Exception: whatever the model raises, with a note that describes the batch.
        """
        if self._tried:
            return True
        self._tried = True
        device = device_of(self.model)
        batch = to_device(self.batches[0], device)
        try:
            with torch.no_grad(), random_state_kept({device}), self._measuring_on(device):
                _number(_to_host([self._call(batch)])[0].loss)
        except Exception as error:
            error.add_note(
                "raised by the first forward of ValidationLoss, to see that it works, of "
                f"batches[0] with {describe(batch)}"
            )
            raise
        return True

    def _is_cheap(self) -> bool:
        """Return True if one forward takes at most about a second and involves no other rank."""
        if dist.is_available() and dist.is_initialized():
            return False
        parameters = list(self.model.parameters())
        if any(is_sharded(p) or p.is_meta for p in parameters):
            return False
        if any(p.device.type != "cpu" for p in parameters):
            return True
        elements: list[int] = []
        map_tensors(lambda tensor: elements.append(tensor.numel()), self.batches[0])
        return sum(p.numel() for p in parameters) * max(elements, default=1) <= _CHEAP

    def new_stage(self) -> None:
        """Move on to the next batches. ``FastForward`` calls this before each stage."""
        self._stages += 1

    def state_dict(self) -> dict[str, int]:
        """Return which batches come next, as part of ``FastForward``'s checkpoint."""
        return {"stages": self._stages}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Continue from a saved state. Raise ``ValueError`` if it is damaged."""
        stages = state_dict.get("stages")
        if type(stages) is not int or stages < 0:
            raise ValueError(
                f"the place in the validation set must be a count, got {shortened(stages)}"
            )
        self._stages = stages

    @property
    def same_examples(self) -> bool:
        """True if all stages measure the same examples."""
        return self.batches_per_stage == len(self.batches)

    # ``FastForward`` calls these two methods if several ranks run a stage together.

    def plan(self) -> tuple[int, int]:
        """Return a fingerprint of this stage's batches, and their number."""
        if self._digest is None:
            self._digest = digest(self.batches)
        place = f"{self.batches_per_stage} {self._stages}".encode()
        # float64, in which the ranks exchange it, holds six bytes exactly.
        number = hashlib.blake2b(self._digest + place, digest_size=6).digest()
        return int.from_bytes(number, "big"), self.batches_per_stage

    @contextmanager
    def share(self, rank: int, size: int, forwards: int, *, split: bool) -> Iterator[int]:
        """Make calls inside this context measure this rank's share of the batches.

        Args:
            rank: rank of this process among those that run the stage.
            size: number of these processes.
            forwards: the largest number of batches on any of these ranks.
            split: whether all ranks have the same batches, so that they can be split.

        Yields:
            The number of ranks among which the batches are split.
        """
        if split and self.process_group is not False:
            if self.process_group is not None:
                group = self.process_group
                rank, size = dist.get_rank(group), dist.get_world_size(group)
            self._split = _Split(rank, size, -(-self.batches_per_stage // size))
        else:
            self._split = _Split(forwards=forwards)
        try:
            yield self._split.size
        finally:
            self._split = _Split()

    def _current(self) -> list[tuple[int, bool]]:
        """Return the indices of this rank's batches in this stage, and whether each counts.

        Before the first stage, return the batches of the first. If ranks run a stage together, all
        of them run the same number of forwards, since forwards may be collective. Batches added
        for that reason do not count.
        """
        first = max(self._stages - 1, 0) * self.batches_per_stage
        every = [(first + offset) % len(self.batches) for offset in range(self.batches_per_stage)]
        own = [(index, True) for index in every[self._split.rank :: self._split.size]]
        return own + [(every[0], False)] * ((self._split.forwards or 0) - len(own))

    @torch.no_grad()
    def __call__(self) -> float:
        """Return the mean loss per label of this stage's batches, in the model's unit."""
        return self.weighted()[0]

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Keep the model in eval mode between calls inside this context.

        ``FastForward`` enters it once per stage, since switching the mode of every module of a
        large model takes as long as some of its kernels.
        """
        if self._mode is not None:
            yield
            return
        if self._graphs is not None:
            self._graphs.check()
        self._mode = EvalMode(self.model)
        try:
            yield
        finally:
            self._mode.put_back()
            self._mode = None

    @contextmanager
    def _measuring_on(self, device: torch.device) -> Iterator[None]:
        context = torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()
        with self.measuring(), context:
            yield

    def weighted(self) -> tuple[float, float]:
        """Return the mean loss per label and the number of labels; both are 0.0 without labels."""
        measurement = self.measure()
        return measurement.loss, measurement.weight

    @torch.no_grad()
    def measure(self) -> Measurement:
        """Return the mean loss per label, its weight, and the losses of the rows.

        ``rows`` has one entry for each row with a label that counts, in the order of the batches,
        or one for a whole batch if the losses of its rows are unknown. If ranks share the batches,
        the entries are those of this rank.

        Raises:
            ValueError: no label of this stage's batches counts.
        """
        device = device_of(self.model)
        with self._measuring_on(device):
            if self.forward is None and self._weights is None:
                self._count_labels(device)
            measured = [
                self._measure_batch(index, counts, device)
                for index, counts in self._current()
                # Ranks that run a stage together must all run the same number of forwards.
                if self._split.forwards is not None or self._weights is None or self._weights[index]
            ]
        measured = _to_host(measured)
        mean, weight = _weighted_mean(measured)
        if not weight > 0 and self._split.forwards is None:
            raise ValueError(
                f"nothing in this stage's {self.batches_per_stage} of the batches counts: all "
                f"labels are {IGNORED}, or all weights that forward returned are zero; leave such "
                "batches out"
            )
        return Measurement(mean, weight, _rows(measured))

    def _measure_batch(self, index: int, counts: bool, device: torch.device) -> _Measured:
        """Measure a batch on the device. Its weight is 0 if it does not count."""
        batch = to_device(self.batches[index], device)
        alone = self._split.forwards is None  # otherwise the forward may be collective
        if self._graphs is None or not alone:
            measured = self._call(batch)
        elif self._is_settled():
            measured = self._graphs(self._call, batch)
        else:
            measured = self._call(batch)
            if self._is_settled():
                self._graphs.record(self._call, batch)
        weight = measured.weight if self._weights is None else self._weights[index]
        if self._row_losses is not None and self._row_losses.is_sum:
            measured = measured._replace(loss=measured.loss / max(weight, 1))
        return measured._replace(weight=weight if counts else 0)

    def _is_settled(self) -> bool:
        """Return True if further calls compute the same, since the rule for rows is decided.

        Deciding it waits for the device.
        """
        return self._row_losses is None or self._row_losses.is_decided

    def _call(self, batch: Any) -> _Measured:
        """Run the model in eval mode. The weight is None unless ``forward`` returns it."""
        if self._mode is not None:
            self._mode.to_eval()
        if self.forward is not None:
            return _check_result(self.forward(self.model, batch))
        output = self.model(**batch)
        loss = self._loss(output)
        rows = self._row_losses and self._row_losses(loss, output, batch.get("labels"))
        return _Measured(loss, None, rows)

    def __repr__(self) -> str:
        count = f"{len(self.batches)} batches"
        if self.batches_per_stage < len(self.batches):
            count += f", {self.batches_per_stage} a stage"
        return f"ValidationLoss({type(self.model).__name__}, {count})"

    def _loss(self, output: Any) -> Any:
        loss = getattr(output, "loss", None)
        if loss is None:
            raise TypeError(
                f"the output of {type(self.model).__name__} has no loss, got "
                f"{type(output).__name__}; put labels into the batches, or pass "
                "forward=function of (model, batch) that returns (loss, weight)"
            )
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise TypeError(
                f"the loss of {type(self.model).__name__} has shape {tuple(loss.shape)}, not one "
                "element; pass forward=function of (model, batch) that returns (loss, weight)"
            )
        return loss

    def _count_labels(self, device: torch.device) -> None:
        """Find out how many labels count in each batch, and whether first labels do."""
        every = [number_of_labels(batch, first=True) for batch in self.batches]
        shifted = [number_of_labels(batch, first=False) for batch in self.batches]
        ambiguous = [index for index, count in enumerate(every) if count != shifted[index]]
        counts, shifts = every, None
        if ambiguous:
            shifts = self._skips_first(to_device(self.batches[ambiguous[0]], device))
            counts = shifted if shifts else every
        elif self._split.forwards is not None:
            # A rank with other batches may need this forward, which may be collective.
            self._call(to_device(self.batches[0], device))
        if sum(counts) == 0:
            raise ValueError(
                "no label in batches counts: the model predicts each label from the ones before "
                "it, and only first labels differ from -100"
            )
        self._weights = counts
        self._row_losses = RowLosses(shifts)

    def _skips_first(self, batch: Mapping[str, Any]) -> bool:
        """Return True if first labels alone give no loss, as in a model that shifts its labels."""
        labels = torch.full_like(batch["labels"], IGNORED)
        labels[:, 0] = batch["labels"][:, 0]
        loss = float(self._call({**batch, "labels": labels}).loss)
        return math.isnan(loss) or loss == 0


def _check_result(result: Any) -> _Measured:
    """Check the result of the user's ``forward``: two numbers, optionally followed by rows.

    Raises:
        TypeError: the result has another form.
    """
    if not isinstance(result, tuple) or len(result) not in (2, 3):
        raise TypeError(
            "forward must return (loss, weight): the batch's mean loss and the number of labels "
            f"it is the mean of; got {type(result).__name__}"
        )
    for value in result[:2]:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise TypeError(
                "forward must return (loss, weight) as numbers or tensors of one element, got a "
                f"tensor of shape {tuple(value.shape)}; reduce it to its mean"
            )
    rows = result[2] if len(result) == 3 else None
    return _Measured(result[0], result[1], None if rows is None else _check_rows(rows))


def _check_rows(rows: Any) -> Any:
    are_tensors = isinstance(rows, tuple) and all(isinstance(value, Tensor) for value in rows)
    if not are_tensors or len(rows) != 2 or rows[0].dim() != 1 or rows[0].shape != rows[1].shape:
        got = [tuple(value.shape) for value in rows] if are_tensors else type(rows).__name__
        raise TypeError(
            "the third value that forward returns must be (sums, weights): two tensors with the "
            f"sum of the losses of each row and its number of labels; got {got}"
        )
    return rows


def _to_host(measured: list[_Measured]) -> list[_Measured]:
    """Convert tensors to lists of numbers, with a single copy from the device."""
    tensors: list[Tensor] = []
    map_tensors(tensors.append, measured)
    if not tensors:
        return measured
    # float64 holds every count and every loss exactly, but MPS does not support it.
    device = tensors[0].device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    flat = [tensor.detach().reshape(-1).to(device, dtype) for tensor in tensors]
    numbers = iter(torch.cat(flat).tolist())

    def take(tensor: Tensor) -> Any:
        return [next(numbers) for _ in range(tensor.numel())]

    host: list[_Measured] = map_tensors(take, measured)
    return host


def _number(value: Any) -> float:
    return float(value[0] if isinstance(value, list) else value)


def _weighted_mean(measured: Iterable[_Measured]) -> tuple[float, float]:
    """Return the weighted mean and the sum of the weights. Losses with weight zero are ignored."""
    pairs = [(_number(batch.loss), _number(batch.weight)) for batch in measured]
    pairs = [(loss, weight) for loss, weight in pairs if weight > 0]
    total = math.fsum(weight for _, weight in pairs)
    if not total > 0:
        return 0.0, 0.0
    # With infinities of both signs fsum raises an error, where a plain sum returns NaN.
    return sum(loss * weight for loss, weight in pairs) / total, total


def _rows(measured: Iterable[_Measured]) -> Rows:
    """Return the rows with labels, or one entry for a batch whose rows are unknown.

    Batches that do not count are skipped.
    """
    units: list[tuple[float, float]] = []
    for batch in measured:
        weight = _number(batch.weight)
        if weight > 0 and batch.rows is None:
            units.append((_number(batch.loss) * weight, weight))
        elif weight > 0:
            units += [unit for unit in zip(*batch.rows, strict=True) if unit[1] > 0]
    return Rows(tuple(loss for loss, _ in units), tuple(weight for _, weight in units))
