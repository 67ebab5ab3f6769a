"""Tensors: the anchor, the candidates on the line through it, commit and roll back.

Knows tensors, a function that measures the loss at their present values, and ``search/``. Knows
no optimizers, no models and no checkpoints.
"""
