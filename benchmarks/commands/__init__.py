"""One module for each command of ``python -m benchmarks``: its options, and what it calls.

May import every other layer.
"""
