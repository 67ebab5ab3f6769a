"""What every layer uses: files, tables, clocks, and the machine that a result comes from.

Imports nothing else of the benchmarks.
"""
