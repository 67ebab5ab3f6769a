"""Tensors: the anchor, the candidates on the line through it, commit and roll back.

This package handles tensors and a function that measures the loss at their present values, and uses
``search/``. It does not depend on optimizers, models or checkpoints.
"""
