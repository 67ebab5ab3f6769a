"""Benchmarks of fastforward_optim on real models: ``python -m benchmarks --help``.

Each folder is a layer. It may import those below it, never those above:

    commands      the command line: a module for each command
    reports       tables and figures, from the files of runs
    runs          a run at equal cost, the grids of ``compare`` and ``paper``
    methods       how each method takes its steps
    measurements  what the library itself costs, without methods or runs
    comparison    what all methods share: model, data, batches, budget, costs
    models        models and adapters
    data          tasks, and their blocks of tokens
    support       files, tables, clocks
"""
