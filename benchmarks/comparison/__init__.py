"""What is equal for all methods: model, data, order of the batches, budget, price of a step.

May import ``support``, ``data`` and ``models``; does not know how a method takes its steps.
"""
