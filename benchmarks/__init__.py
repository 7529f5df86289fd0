"""What a launcher adds to a training, measured beside its peers in the same run: ``python -m benchmarks --help``.

Not part of the package. Each contender is a driver process of its own (``drivers``), which is asked for one sample at a
time, so that they take turns and what disturbs one disturbs all. What is measured is read from marks that the ranks
leave in files (``marks``), which cost every contender the same.
"""
