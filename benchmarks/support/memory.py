"""The memory that live tensors take."""

from __future__ import annotations

import gc

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def live_tensor_bytes() -> int:
    """Return the bytes of the storages of all tensors that the garbage collector tracks."""
    gc.collect()
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if issubclass(type(tensor), Tensor)  # isinstance would load lazy objects
        and not issubclass(type(tensor), FakeTensor)  # left by torch.compile, without memory
    }
    return sum(storages.values())
