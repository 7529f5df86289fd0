"""Looking at a cluster for ``kfpytorch-ray doctor``: over its job API, and by a launch whose ranks report their nodes.

Measuring and judging are apart, as in kfpytorch_ray.doctor. The launch goes the way that any launch goes.
"""
