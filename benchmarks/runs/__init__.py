"""Runs: a run at equal cost, the grids of ``compare`` and ``paper``, and the files they write.

May import ``methods`` and the layers below it.
"""
