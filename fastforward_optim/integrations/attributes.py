"""Save the attributes of objects, and restore them after a call that may have changed them.

Knows Python and tensors, but no framework.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

CONTAINERS = (dict, list, set, deque, Counter, OrderedDict, defaultdict)

# Do not look into the items of containers larger than this, which are most likely data sets. The
# containers themselves are restored.
_MAX_ITEMS = 10_000


class Attributes:
    """A snapshot of the attributes of some objects.

    Saves numbers, strings and references, and values that are changed in place: tensors, and
    (nested) lists, dicts, sets and deques. Parameters are not saved, nor are the contents of other
    objects.

    Cost: time proportional to the number of items, and a copy of each tensor.

    Args:
        owners: the objects whose attributes are saved.
        is_owner: returns True for an object, found in an attribute, that is to be saved as well.
        leave: objects not to look into, such as data sets.
    """

    def __init__(
        self,
        owners: Iterable[Any],
        is_owner: Callable[[Any], bool] = lambda value: False,
        leave: Iterable[Any] = (),
    ) -> None:
        self._owners: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, int, Tensor]] = []
        self._is_owner = is_owner
        left = list(leave)
        seen = {id(value) for value in left}
        found: list[Any] = []
        for owner in owners:
            seen.add(id(owner))
            found += self._keep_owner(owner)
        while found:
            value = found.pop()
            if id(value) not in seen:
                seen.add(id(value))
                found += self._keep(value)

    def _keep(self, value: Any) -> Iterable[Any]:
        """Save a value that can be changed in place, and return the items in it to save next."""
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and not value.is_inference():
                self._tensors.append((value, value._version, value.clone()))
            return ()
        if type(value) in CONTAINERS:
            self._containers.append((value, copy.copy(value)))
        elif type(value) is not tuple:
            return self._keep_owner(value)
        items = value.values() if isinstance(value, dict) else value
        return self._holders(items) if len(value) <= _MAX_ITEMS else ()

    def _keep_owner(self, owner: Any) -> Iterable[Any]:
        attributes = vars(owner)
        self._owners.append((attributes, dict(attributes)))
        return self._holders(attributes.values())

    def _holders(self, items: Iterable[Any]) -> list[Any]:
        return [
            item
            for item in items
            if isinstance(item, Tensor)
            or type(item) in CONTAINERS
            or type(item) is tuple
            or self._is_owner(item)
        ]

    def put_back(self) -> None:
        """Restore the saved attributes. Containers and tensors are restored in place."""
        for attributes, before in self._owners:
            for name in attributes.keys() - before.keys():
                del attributes[name]
            attributes.update(before)
        for container, content in self._containers:
            container.clear()
            add = container.extend if isinstance(container, (list, deque)) else container.update
            add(content)
        for tensor, version, value in self._tensors:
            if tensor._version != version:
                with torch.no_grad():
                    tensor.copy_(value)


def own_objects(owner: Any) -> Callable[[Any], bool]:
    """Return a function that tells whether an object belongs to ``owner``, such as a meter.

    It does if its class comes from a module of the owner's class or base classes, or if it is a
    ``SimpleNamespace``. Models, optimizers, schedulers and data sets never do.
    """
    modules = {parent.__module__ for parent in type(owner).__mro__} - {"builtins"}

    def is_own(value: Any) -> bool:
        if isinstance(value, SimpleNamespace):
            return True
        own = type(value).__module__ in modules and hasattr(value, "__dict__")
        return own and not isinstance(value, (nn.Module, Optimizer, LRScheduler, Dataset))

    return is_own


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Set attributes of an object inside this context, and restore the previous ones on exit."""
    before = {name: vars(owner)[name] for name in attributes if name in vars(owner)}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name in attributes:
            if name in before:
                setattr(owner, name, before[name])
            elif name in vars(owner):
                delattr(owner, name)
