"""What the library itself costs and finds, measured without comparing methods.

May import ``comparison`` and the layers below it.
"""
