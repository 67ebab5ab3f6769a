"""Build a ``val_fn`` from a model and a few batches."""

from __future__ import annotations

import hashlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .arguments import check_integer
from .distributed import check_process_group, rank_and_size

Forward = Callable[[nn.Module, Any], tuple[Any, Any]]

# torch.nn.functional.cross_entropy and transformers skip labels of this value.
IGNORED = -100


class _Share(NamedTuple):
    """Which of a stage's batches this rank measures; forwards is None where it is alone."""

    rank: int = 0
    size: int = 1
    forwards: int | None = None


class ValidationLoss:
    """Mean loss per label over a few batches, in eval mode: a ``val_fn`` for ``FastForward``.

    Each batch's loss is weighted by the number of labels that it is the mean of, so that any
    split into batches gives the loss of one big batch. These are the labels that differ from -100;
    for a causal language model without the first label of each row, to which no prediction
    belongs. Whether the model skips the first labels is found out from the model itself: the first
    call makes one forward more, of one batch, if the answer matters.

    A call costs one forward of each batch and one synchronisation with the device. Every module's
    train or eval mode is put back after it.

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
            more: pass eight times as many, and an eighth of them for each stage.
        autocast: dtype for ``torch.autocast`` in the forward, the one you train with; None leaves
            autocasting as it is where ``val_fn`` is called.
        forward: for other models: ``forward(model, batch) -> (loss, weight)``, where ``loss`` is
            the batch's mean loss and ``weight`` the number of labels, each a number or a tensor of
            one element. Batches may then be anything.
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

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        batches_per_stage: int | None = None,
        autocast: torch.dtype | None = None,
        forward: Forward | None = None,
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
        self.batches = [_to(batch, _device(model)) for batch in batches]
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
            _check_batches(self.batches)
        # Labels counted in each batch; found at the first call, since it may take a forward.
        self._weights: list[int] | None = None

    def new_stage(self) -> None:
        """Take the next batches; ``FastForward`` calls it before each stage."""
        self._stages += 1

    def state_dict(self) -> dict[str, int]:
        """Which batches are next; part of ``FastForward``'s checkpoint."""
        return {"stages": self._stages}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on where ``state_dict`` was taken."""
        self._stages = int(state_dict["stages"])

    # What ``FastForward`` calls where several ranks run a stage together.

    def plan(self) -> tuple[int, int]:
        """A number that tells this stage's batches from others, and how many they are."""
        if self._digest is None:
            self._digest = _digest(self.batches)
        place = f"{self.batches_per_stage} {self._stages}".encode()
        # Six bytes are a whole number in float64 too.
        number = hashlib.blake2b(self._digest + place, digest_size=6).digest()
        return int.from_bytes(number, "big"), self.batches_per_stage

    @contextmanager
    def share(self, rank: int, size: int, forwards: int, *, split: bool) -> Iterator[None]:
        """While it lasts, a call measures this rank's share of the batches.

        Args:
            rank: of this process among those that run the stage.
            size: how many they are.
            forwards: the most batches that any of them has.
            split: whether all have the same batches.
        """
        if split and self.process_group is not False:
            if self.process_group is not None:
                rank, size = rank_and_size(self.process_group)
            self._share = _Share(rank, size, -(-self.batches_per_stage // size))
        else:
            self._share = _Share(forwards=forwards)
        try:
            yield
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

    @torch.no_grad()
    def weighted(self) -> tuple[float, float]:
        """The mean loss per label, and of how many labels it is the mean; both 0.0 of none."""
        device = _device(self.model)
        context = torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()
        with _eval_mode(self.model), context:
            if self.forward is None:
                measured = self._measure_labels(device)
            else:
                results = [
                    (
                        _check_pair(self.forward(self.model, _to(self.batches[index], device))),
                        counts,
                    )
                    for index, counts in self._current()
                ]
                measured = [(loss, weight if counts else 0) for (loss, weight), counts in results]
        losses, weights = zip(*measured, strict=True) if measured else ((), ())
        mean, weight = _weighted_mean(*_to_floats(losses, weights))
        if not weight > 0 and self._share.forwards is None:
            raise ValueError(
                f"nothing in this stage's {self.batches_per_stage} of the batches counts: all "
                f"labels are {IGNORED}, or all weights that forward returned are zero; leave such "
                "batches out"
            )
        return mean, weight

    def _measure_labels(self, device: torch.device) -> list[tuple[Any, int]]:
        if self._weights is None:
            self._weights = self._count_labels(device)
        weighted = [
            (index, self._weights[index] if counts else 0) for index, counts in self._current()
        ]
        return [
            (self._loss(_to(self.batches[index], device)), weight)
            for index, weight in weighted
            if weight or self._share.forwards is not None
        ]

    def __repr__(self) -> str:
        count = f"{len(self.batches)} batches"
        if self.batches_per_stage < len(self.batches):
            count += f", {self.batches_per_stage} a stage"
        return f"ValidationLoss({type(self.model).__name__}, {count})"

    def _loss(self, batch: Mapping[str, Any]) -> Any:
        output = self.model(**batch)
        loss = getattr(output, "loss", None)
        if loss is None:
            raise TypeError(
                f"the output of {type(self.model).__name__} has no loss, got "
                f"{type(output).__name__}; put labels into the batches, or pass "
                "forward=function of (model, batch) that returns (loss, weight)"
            )
        return loss

    def _count_labels(self, device: torch.device) -> list[int]:
        every = [_number_of_labels(batch, first=True) for batch in self.batches]
        shifted = [_number_of_labels(batch, first=False) for batch in self.batches]
        telling = [index for index, count in enumerate(every) if count != shifted[index]]
        counts = every
        if telling:
            counts = shifted if self._skips_first(_to(self.batches[telling[0]], device)) else every
        elif self._share.forwards is not None:
            # A rank that has other batches may have to ask, and the forward may be collective.
            self._loss(_to(self.batches[0], device))
        if sum(counts) == 0:
            raise ValueError(
                "no label in batches counts: the model predicts each label from the ones before "
                "it, and only first labels differ from -100"
            )
        return counts

    def _skips_first(self, batch: Mapping[str, Any]) -> bool:
        """Whether first labels alone give no loss, as in a model that shifts its labels."""
        labels = torch.full_like(batch["labels"], IGNORED)
        labels[:, 0] = batch["labels"][:, 0]
        loss = float(self._loss({**batch, "labels": labels}))
        return math.isnan(loss) or loss == 0


def _check_batches(batches: list[Any]) -> None:
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise TypeError(
                "a batch must be a mapping from argument names to tensors, got "
                f"{type(batch).__name__}; for other batches pass forward=function of "
                "(model, batch) that returns (loss, weight)"
            )
    if sum(_number_of_labels(batch, first=True) for batch in batches) == 0:
        raise ValueError(
            f"all labels in batches are {IGNORED}, so no loss is defined; check the collator or "
            "the truncation that made them"
        )


def _check_pair(result: Any) -> tuple[Any, Any]:
    """What a ``forward`` of the user's returned, if it is two numbers."""
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            "forward must return (loss, weight): the batch's mean loss and the number of labels "
            f"it is the mean of; got {type(result).__name__}"
        )
    for value in result:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise TypeError(
                "forward must return (loss, weight) as numbers or tensors of one element, got a "
                f"tensor of shape {tuple(value.shape)}; reduce it to its mean"
            )
    return result[0], result[1]


def _number_of_labels(batch: Mapping[str, Any], *, first: bool) -> int:
    """Labels that count, with or without the first of each row of token labels."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        sizes = [value.shape[0] for value in batch.values() if isinstance(value, Tensor)]
        return sizes[0] if sizes else 1
    if labels.is_floating_point():  # of a regression, where every number counts
        return labels.numel()
    if not first and labels.dim() == 2:
        labels = labels[:, 1:]
    return int((labels != IGNORED).sum())


def _to_floats(*columns: Iterable[Any]) -> list[list[float]]:
    """The columns as floats, with one copy from the device for all of them."""
    rows = [list(column) for column in columns]
    values = [value for row in rows for value in row]
    tensors = [value.detach().reshape(()) for value in values if isinstance(value, Tensor)]
    if tensors:
        # float64 holds every count and every loss exactly; MPS has none.
        dtype = torch.float32 if tensors[0].device.type == "mps" else torch.float64
        copied = iter(torch.stack([tensor.to(dtype) for tensor in tensors]).tolist())
        values = [next(copied) if isinstance(value, Tensor) else value for value in values]
    numbers = iter(values)
    return [[float(next(numbers)) for _ in row] for row in rows]


def _weighted_mean(losses: Iterable[float], weights: Iterable[float]) -> tuple[float, float]:
    """The mean, and the sum of the weights; a loss whose weight is zero may be anything."""
    pairs = [(loss, weight) for loss, weight in zip(losses, weights, strict=True) if weight > 0]
    total = math.fsum(weight for _, weight in pairs)
    if not total > 0:
        return 0.0, 0.0
    # fsum raises where finite terms meet both infinities; a plain sum gives NaN.
    return sum(loss * weight for loss, weight in pairs) / total, total


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # Modules that override train() hear of the change; then each gets its own mode back.
        model.train(modes[0][1])
        for module, mode in modes:
            module.training = mode


def _digest(batches: list[Any]) -> bytes:
    """The same on two ranks if they have the same batches."""
    data = io.BytesIO()
    try:
        torch.save(_to(batches, torch.device("cpu")), data)
    except Exception:  # what cannot be saved cannot be compared: as if it was another
        return os.urandom(16)
    return hashlib.blake2b(data.getbuffer(), digest_size=16).digest()


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def _to(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it on ``device``; tensors that are there are not copied."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_to(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_to(item, device) for item in value)
    return value
