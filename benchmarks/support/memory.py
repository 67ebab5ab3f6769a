"""Memory in use, as Python can see it."""

from __future__ import annotations

import gc

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def live_tensor_bytes() -> int:
    """Bytes of the storages of all tensors that Python can reach."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if issubclass(type(tensor), Tensor)  # isinstance would wake up lazy objects
        and not issubclass(type(tensor), FakeTensor)  # left by torch.compile, without memory
    }
    return sum(storages.values())
