"""Build a ``val_fn`` from a model and a few batches."""

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
from ..saved_numbers import shortened
from ..search.evidence import Measurement, Rows
from ..stage.sharded import is_sharded
from ..stage.stage import random_state_kept
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

# Parameters times numbers in a batch up to which a forward on a CPU takes about a second.
_CHEAP = 2 * 10**10


class _Share(NamedTuple):
    """Which of a stage's batches this rank measures; forwards is None where it is alone."""

    rank: int = 0
    size: int = 1
    forwards: int | None = None


class _Measured(NamedTuple):
    """Of a batch: mean loss, weight, and its rows' sums of losses and weights if they are known.

    Numbers and tensors on the device; on the host numbers and lists.
    """

    loss: Any
    weight: Any  # None if it is not known where the forward is made
    rows: Any = None


class ValidationLoss(ValidationFunction):
    """Mean loss per label over a few batches, in eval mode: a ``val_fn`` for ``FastForward``.

    Each batch's loss is weighted by the number of labels that it is the mean of, so that any
    split into batches gives the loss of one big batch; a model's sum over its labels is divided by
    their number, where it can be told from a mean. These are the labels that differ from -100;
    for a causal language model without the first label of each row, to which no prediction
    belongs. Whether the model skips the first labels is found out from the model itself: the first
    call makes one forward more, of one batch, if the answer matters.

    :meth:`measure` also gives the losses of the rows, so that two measurements can be compared
    example by example. They come from the logits of the same forwards, where the model's output has
    them and its loss is the mean of cross-entropies, of squared errors or of binary
    cross-entropies; the first batch measured is compared. Otherwise each batch is one unit.

    A call costs one forward of each batch and one synchronisation with the device; for the losses
    of the rows the log-probabilities are computed once more, in at most 128 MiB, or as much as the
    logits of one row take in float32. Every module's train or eval mode is put back after it, or
    after the stage that it belongs to.

    Where several ranks run a stage together, each measures its share of the batches, and
    ``FastForward`` takes the mean: a trial takes as much less time. Ranks that have been given
    different batches (by a ``DistributedSampler``, say) measure all of theirs. A call outside a
    stage is of this rank alone and measures all of its batches.

    Args:
        model: called as ``model(**batch)``; its output must have a ``loss``, the mean over the
            batch's labels. Batches without ``labels`` are weighted by their first dimension.
        batches: mappings from argument names to tensors, for instance a ``DataLoader``. They are
            read once, when this is constructed, and kept on the model's device (not copied where
            they are there already). Take examples that you neither train on nor
            report on: the paper uses 32.
        batches_per_stage: how many of the batches one stage measures: the next ones at each
            stage, the same ones for all its trials, from the first again after the last. Default:
            all of them. Fresh examples cannot be overfitted by many stages in a row, and cost no
            more: pass eight times as many, and an eighth of them for each stage. With
            ``calibrate_lr`` the probe measures the first ones and all checks the next.
        autocast: dtype for ``torch.autocast`` in the forward, the one you train with; None leaves
            autocasting as it is where ``val_fn`` is called.
        forward: for other models: ``forward(model, batch) -> (loss, weight)``, where ``loss`` is
            the batch's mean loss and ``weight`` the number of labels, each a number or a tensor of
            one element. Batches may then be anything. A third value, ``(sums, weights)``, two
            tensors of shape (rows,), gives the sum of the losses of each row and its number of
            labels.
        group_by_length: cut the padding: at construction the rows of each stage's batches are
            regrouped so that those of one length are together. The loss is the same up to
            rounding. Each batch needs an ``attention_mask``, and one entry for each row in every
            other value, or one for each token: what has the mask's shape in all batches.
        cuda_graphs: on a GPU, record each forward as a CUDA graph and replay it, which is faster
            where starting the kernels takes longer than they do: for small models and small
            batches. Batches of one shape share a graph. The first two calls measure without it,
            and the second compares. What the model computes with besides its tensors, such as a
            LoRA scaling, is as it was when it was recorded, and hooks are not called again; tensors
            that are not the model's have to stay where they are. The
            memory of a forward stays allocated. Without effect where the ranks of several
            processes run a stage together, and on a CPU.
        process_group: the ranks among which a stage's batches are split. Default: all that run
            it; with tensor parallelism, whose ranks compute each batch together, the
            data-parallel ones (``mesh["dp"].get_group()``); False: each measures all.

    Raises:
        ValueError: there are no batches, no label that counts, or fewer batches than one stage
            is to measure.
        TypeError: a batch is not a mapping and there is no ``forward``.

    Examples:
        >>> val_fn = ValidationLoss(model, DataLoader(val_set, batch_size=16, collate_fn=collate))
        >>> optimizer = FastForward(AdamW(lora_parameters(model)), val_fn)
    """

    # What is not ready before training begins, a trainer's own loss say, is tried then.
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
        self._share = _Share()
        self._digest: bytes | None = None  # of the batches, once it has been asked for
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
        self._mode: EvalMode | None = None  # of the model, while it is measured
        # Labels counted in each batch; found at the first call, since it may take a forward.
        self._weights: list[int] | None = None
        self._row_losses: RowLosses | None = None
        self._tried = False
        if self._is_tried_at_once and self._is_cheap():
            self.check()

    def check(self) -> bool:
        """Try the forward of the first batch, once; without a trace.

        It is tried when this is constructed, or, where it may take long (a large model that is on
        the CPU still) or all ranks have to take part (a sharded model), by ``FastForward`` before
        the first step.

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
        """Whether one forward takes about a second at most, as far as can be told, and no rank."""
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
        """Take the next batches; ``FastForward`` calls it before each stage."""
        self._stages += 1

    def state_dict(self) -> dict[str, int]:
        """Which batches are next; part of ``FastForward``'s checkpoint."""
        return {"stages": self._stages}

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> None:
        """Go on where ``state_dict`` was taken; ``ValueError`` if it is damaged."""
        stages = state_dict.get("stages")
        if type(stages) is not int or stages < 0:
            raise ValueError(
                f"the place in the validation set must be a count, got {shortened(stages)}"
            )
        self._stages = stages

    @property
    def same_examples(self) -> bool:
        """Whether all stages measure the same ones."""
        return self.batches_per_stage == len(self.batches)

    # What ``FastForward`` calls where several ranks run a stage together.

    def plan(self) -> tuple[int, int]:
        """A number that tells this stage's batches from others, and how many they are."""
        if self._digest is None:
            self._digest = digest(self.batches)
        place = f"{self.batches_per_stage} {self._stages}".encode()
        # Six bytes are a whole number in float64 too.
        number = hashlib.blake2b(self._digest + place, digest_size=6).digest()
        return int.from_bytes(number, "big"), self.batches_per_stage

    @contextmanager
    def share(self, rank: int, size: int, forwards: int, *, split: bool) -> Iterator[int]:
        """While it lasts, a call measures this rank's share of the batches.

        Args:
            rank: of this process among those that run the stage.
            size: how many they are.
            forwards: the most batches that any of them has.
            split: whether all have the same batches.

        Yields:
            Over how many ranks they are split.
        """
        if split and self.process_group is not False:
            if self.process_group is not None:
                group = self.process_group
                rank, size = dist.get_rank(group), dist.get_world_size(group)
            self._share = _Share(rank, size, -(-self.batches_per_stage // size))
        else:
            self._share = _Share(forwards=forwards)
        try:
            yield self._share.size
        finally:
            self._share = _Share()

    def _current(self) -> list[tuple[int, bool]]:
        """Indices of the batches of this stage and rank, and whether they count.

        Before the first stage those of the first. Where ranks run it together all make as many
        forwards, since these may be collective: some of them count for nothing.
        """
        first = max(self._stages - 1, 0) * self.batches_per_stage
        every = [(first + offset) % len(self.batches) for offset in range(self.batches_per_stage)]
        own = [(index, True) for index in every[self._share.rank :: self._share.size]]
        return own + [(every[0], False)] * ((self._share.forwards or 0) - len(own))

    @torch.no_grad()
    def __call__(self) -> float:
        """Return the mean loss per label of this stage's batches, in the model's unit."""
        return self.weighted()[0]

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """While it lasts the model stays in eval mode from one call to the next.

        ``FastForward`` is in it for the length of a stage: to change the mode of each module of a
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
        """The mean loss per label, and of how many labels it is the mean; both 0.0 of none."""
        measurement = self.measure()
        return measurement.loss, measurement.weight

    @torch.no_grad()
    def measure(self) -> Measurement:
        """The mean loss per label, its weight, and the losses of the rows.

        A unit of ``rows`` is a row with a label that counts, in the order of the batches, or a
        batch where the losses of its rows are not known. Where ranks share the batches they are of
        this rank.

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
                # Where ranks run a stage together all make as many forwards.
                if self._share.forwards is not None or self._weights is None or self._weights[index]
            ]
        measured = _to_host(measured)
        mean, weight = _weighted_mean(measured)
        if not weight > 0 and self._share.forwards is None:
            raise ValueError(
                f"nothing in this stage's {self.batches_per_stage} of the batches counts: all "
                f"labels are {IGNORED}, or all weights that forward returned are zero; leave such "
                "batches out"
            )
        return Measurement(mean, weight, _rows(measured))

    def _measure_batch(self, index: int, counts: bool, device: torch.device) -> _Measured:
        """A batch on the device; its weight is 0 if it does not count."""
        batch = to_device(self.batches[index], device)
        alone = self._share.forwards is None  # else the forward may be collective
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
        """Whether further calls compute the same: finding out what that is waits for the device."""
        return self._row_losses is None or self._row_losses.is_decided

    def _call(self, batch: Any) -> _Measured:
        """Run the model, in eval mode; the weight is None if it is not known here."""
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
        """Find out how many labels count in each batch, and which of them."""
        every = [number_of_labels(batch, first=True) for batch in self.batches]
        shifted = [number_of_labels(batch, first=False) for batch in self.batches]
        telling = [index for index, count in enumerate(every) if count != shifted[index]]
        counts, shifts = every, None
        if telling:
            shifts = self._skips_first(to_device(self.batches[telling[0]], device))
            counts = shifted if shifts else every
        elif self._share.forwards is not None:
            # A rank that has other batches may have to ask, and the forward may be collective.
            self._call(to_device(self.batches[0], device))
        if sum(counts) == 0:
            raise ValueError(
                "no label in batches counts: the model predicts each label from the ones before "
                "it, and only first labels differ from -100"
            )
        self._weights = counts
        self._row_losses = RowLosses(shifts)

    def _skips_first(self, batch: Mapping[str, Any]) -> bool:
        """Whether first labels alone give no loss, as in a model that shifts its labels."""
        labels = torch.full_like(batch["labels"], IGNORED)
        labels[:, 0] = batch["labels"][:, 0]
        loss = float(self._call({**batch, "labels": labels}).loss)
        return math.isnan(loss) or loss == 0


def _check_result(result: Any) -> _Measured:
    """What a ``forward`` of the user's returned, if it is two numbers, with or without rows."""
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
    """The same as numbers and lists of them, with one copy from the device for all of it."""
    tensors: list[Tensor] = []
    map_tensors(tensors.append, measured)
    if not tensors:
        return measured
    # float64 holds every count and every loss exactly; MPS has none.
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
    """The mean, and the sum of the weights; a loss whose weight is zero may be anything."""
    pairs = [(_number(batch.loss), _number(batch.weight)) for batch in measured]
    pairs = [(loss, weight) for loss, weight in pairs if weight > 0]
    total = math.fsum(weight for _, weight in pairs)
    if not total > 0:
        return 0.0, 0.0
    # fsum raises where finite terms meet both infinities; a plain sum gives NaN.
    return sum(loss * weight for loss, weight in pairs) / total, total


def _rows(measured: Iterable[_Measured]) -> Rows:
    """Of the batches that count: their rows with labels, or the batch as one unit."""
    units: list[tuple[float, float]] = []
    for batch in measured:
        weight = _number(batch.weight)
        if weight > 0 and batch.rows is None:
            units.append((_number(batch.loss) * weight, weight))
        elif weight > 0:
            units += [unit for unit in zip(*batch.rows, strict=True) if unit[1] > 0]
    return Rows(tuple(loss for loss, _ in units), tuple(weight for _, weight in units))
