"""What all methods of a comparison share: model, data, batches, budget, and costs in FLOPs.

May import ``support``, ``data`` and ``models``; does not know how a method takes its steps.
"""
