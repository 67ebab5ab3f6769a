"""Mathematics: how far to go along a step, and how certain a difference of two losses is.

This package works on numbers only. A search is a function of ``evaluate(tau) -> loss``: it does not
depend on tensors, models, optimizers or ranks.
"""
