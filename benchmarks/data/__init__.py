"""What the models are trained on: texts, and the blocks of tokens made from them.

May import ``support``.
"""
