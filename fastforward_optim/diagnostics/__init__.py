"""Mistakes that can be seen, and what is said about them.

Before the run: optimizers that cannot be wrapped. While it goes: what its losses, its rates and
its times show. Knows ``torch.optim`` and the records of stages, and changes nothing.
"""
