"""Training runs: one run, the grid of `compare`, the evaluation of `paper`, and what they keep.

May import ``methods`` and the layers below it.
"""
