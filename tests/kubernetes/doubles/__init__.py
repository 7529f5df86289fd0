"""What the real API server has nobody for in tests: a node with its kubelet and scheduler, and KubeRay's operator.

They are not shipped and know nothing of kfpytorch_ray but its testing tools: they read and write objects, and run Pods.
"""
