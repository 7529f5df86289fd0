"""The driver of a run on KubeRay: ``python -m kfpytorch_ray.cluster.kube.driver RUN_ID URI [SHA256:BYTES]``.

The driver of every remote run, once the user's modules are unpacked; the last argument names their zip. Prints a mark
first, from which on the log of whoever submitted it is this process's.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from kfpytorch_ray.cluster.kube import code
from kfpytorch_ray.cluster.kube.pod_log import mark_of
from kfpytorch_ray.cluster.remote import driver
from kfpytorch_ray.errors import KfpytorchRayError
from kfpytorch_ray.storage import Digest, Storage


def main(run_id: str, uri: str, packed: str = "") -> int:
    """Run what the folder at ``uri`` asks for.

    Returns:
        The exit code, as of the driver of every remote run.
    """
    sys.stdout.write(mark_of(run_id))
    sys.stdout.flush()
    if not packed:
        return driver.main(uri)
    with tempfile.TemporaryDirectory(prefix="kfpytorch-ray-") as folder:
        working_dir = Path(folder, "code")
        working_dir.mkdir()
        sha256, _, size = packed.partition(":")
        try:
            code.receive(Storage(uri.partition("#")[0]), Digest(sha256, int(size)), working_dir)
        except KfpytorchRayError as error:
            sys.stderr.write(f"{error}\n")
            return driver.EXIT_FAILED
        return driver.main(uri, str(working_dir))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
