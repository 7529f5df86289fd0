"""The volumes of a Pod as folders of this machine: emptyDir, hostPath, Secrets and ConfigMaps."""

from __future__ import annotations

from pathlib import Path

from doubles.api import Document
from doubles.variables import MissingReferenceError, Read, data_of

_PRIVATE_ANYWAY = ("/tmp", "/dev/shm")


def mounts(container: Document, pod: Document, folder: Path, read: Read) -> list[tuple[Path, str]]:
    """What a container mounts: paths here, and where it finds them.

    Args:
        container: Its specification.
        pod: The Pod that it is in.
        folder: Of the Pod, for what is made.
        read: Gives Secrets and ConfigMaps.

    Raises:
        MissingReferenceError: One is not there, or is of a kind that these doubles do not know.
    """
    volumes = {volume["name"]: volume for volume in pod["spec"].get("volumes", [])}
    found = []
    for mount in container.get("volumeMounts", []):
        if mount["mountPath"] not in _PRIVATE_ANYWAY:
            place = _place(volumes[mount["name"]], folder / "volumes" / mount["name"], read)
            found.append((place / mount.get("subPath", ""), mount["mountPath"]))
    return found


def _place(volume: Document, folder: Path, read: Read) -> Path:
    if "hostPath" in volume:
        return Path(volume["hostPath"]["path"])
    folder.mkdir(parents=True, exist_ok=True)
    if "emptyDir" in volume:
        return folder
    for kind, name in (("secret", "secretName"), ("configMap", "name")):
        if source := volume.get(kind):
            data = data_of(kind, {"name": source[name], "optional": source.get("optional")}, read)
            paths = {item["key"]: item["path"] for item in source["items"]} if source.get("items") else None
            for key, value in data.items():
                if paths is None or key in paths:
                    file = folder / (key if paths is None else paths[key])
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(value)
            return folder
    msg = f"these doubles have no such volume: {volume}"
    raise MissingReferenceError(msg)
