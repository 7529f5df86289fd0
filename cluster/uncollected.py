"""The first import of a fork server: no garbage is collected while it imports the others, which takes 0.3 s of 2.

kfpytorch_ray.cluster.preloaded, the last one, ends it.
"""

import gc

gc.disable()
