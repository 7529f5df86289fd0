"""What ``kfpytorch-ray doctor`` finds out about this machine; a cluster is its backend's to look at.

Measuring and judging are apart: a module that measures returns plain facts, and what follows from them is pure.
"""
