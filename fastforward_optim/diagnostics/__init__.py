"""Mistakes that can be detected, and the errors and warnings about them.

Before the run: optimizers that cannot be wrapped, and a ``val_fn`` that does not work. While it
goes: what its losses, rates and times show. Knows ``torch.optim``, the records of stages and the
calibration, and changes nothing.
"""
