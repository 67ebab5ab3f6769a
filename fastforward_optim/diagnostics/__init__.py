"""Detect common mistakes, and raise errors or give warnings about them.

Before the run: optimizers that cannot be wrapped, and a ``val_fn`` that does not work. During the
run: mistakes that losses, learning rates and times reveal. Knows ``torch.optim``, the records of
stages and the calibration, and changes nothing.
"""
