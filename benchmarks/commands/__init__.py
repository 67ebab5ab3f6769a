"""The commands of ``python -m benchmarks``, a module each: options, and calls to the layers below.

May import every other layer.
"""
