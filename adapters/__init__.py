"""Top floor: one module per way to run a plan. Found by name through kfpytorch_ray.backends."""

if __name__ == "adapters":
    msg = "Import kfpytorch_ray.adapters, not adapters: the bare name makes a second copy of every class."
    raise ImportError(msg)
