"""Tables and figures, made from the files that runs leave.

May import ``runs``, for the layout of its files, and ``methods``, for their names; never a model.
"""
