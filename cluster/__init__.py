"""Middle floor: the machinery of a run on Ray. Only adapters/ calls it."""

if __name__ == "cluster":
    msg = "Import kfpytorch_ray.cluster, not cluster: the bare name makes a second copy of every class."
    raise ImportError(msg)
