"""Mathematics: how far to go along a step, and how sure a difference of two losses is.

Numbers only. A search here is a function of ``evaluate(tau) -> loss``: it knows no tensors, no
models, no optimizers and no ranks.
"""
