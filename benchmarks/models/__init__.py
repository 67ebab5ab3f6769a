"""The models that are trained, their adapters, and models with random weights for timing.

May import ``support``.
"""
