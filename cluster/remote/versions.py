"""Whether this machine and a cluster would understand each other, judged before anything is sent.

The table below says for each package what a difference breaks: what cannot be unpickled, or spoken, is an error; what
may only behave differently is a warning. Both sides find out with ``here()``, which imports nothing.
"""

from __future__ import annotations

import logging
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from kfpytorch_ray.errors import VersionMismatchError, explain

logger = logging.getLogger(__name__)

PROTOCOL = 1
"""Of what the two sides leave for each other in storage. Raised when an older side could not read it."""

LOWEST_RAY = "2.49"
"""As in pyproject.toml, which the cluster need not have: our code may come to it by ``py_modules``."""

SEND_IT = 'RayBackend(runtime_env={"py_modules": [os.path.dirname(kfpytorch_ray.__file__)]})'
"""Python that has our own code travel with a job."""

_HERE = "on this machine"
_TEXTS = ("python", "ray", "torch", "flytekit", "cloudpickle", "kfpytorch_ray")


@dataclass(frozen=True, slots=True)
class Versions:
    """What one side has. None: not installed, or not said.

    Attributes:
        python: Version of the interpreter.
        ray: Version of the package, as the following ones.
        torch: May end in a local label such as ``+cu128``.
        flytekit: As above.
        cloudpickle: As above.
        kfpytorch_ray: None also where our code was sent and not installed.
        protocol: ``PROTOCOL`` of our code.
    """

    python: str | None = None
    ray: str | None = None
    torch: str | None = None
    flytekit: str | None = None
    cloudpickle: str | None = None
    kfpytorch_ray: str | None = None
    protocol: int | None = None

    def to_json(self) -> dict[str, str | int | None]:
        """As ``json`` takes it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: object) -> Versions:
        """From what ``json`` gives. Unknown fields are ignored; what is missing or of another type is None."""
        given: Mapping[str, Any] = value if isinstance(value, dict) else {}
        texts = {name: text for name in _TEXTS if isinstance(text := given.get(name), str)}
        protocol = given.get("protocol")
        return cls(**texts, protocol=protocol if type(protocol) is int else None)

    def __str__(self) -> str:
        known = [f"{name} {item}" for name, item in self.to_json().items() if item is not None]
        return ", ".join(known) or "no versions are known"


def here() -> Versions:
    """The versions of this process, from the metadata of its packages."""
    packages = {name: _installed(name) for name in _TEXTS if name != "python"}
    return Versions(platform.python_version(), **packages, protocol=PROTOCOL)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found: each text says what, why and how to fix it."""

    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def compare(here: Versions, there: Versions, where: str = "the cluster") -> Comparison:
    """Judge the versions of two sides.

    Args:
        here: This side, which sends and reads the results.
        there: The side that runs.
        where: Its name for people.
    """
    errors = [*_python(here, there, where), *_own_protocol(here, there, where)]
    warnings = _own_version(here, there, where)
    for rule in _RULES:
        mine, other = getattr(here, rule.package), getattr(there, rule.package)
        if other is None:
            errors.append(_missing(rule, mine, where))
        elif rule.lowest and _release(other) < _release(rule.lowest):
            errors.append(_too_old(rule, other, where))
        elif mine is not None and _release(mine)[:1] != _release(other)[:1]:
            (errors if rule.major_breaks else warnings).append(_differs(rule, mine, other, where, rule.major))
        elif mine is not None and _release(mine) != _release(other):
            warnings.append(_differs(rule, mine, other, where, rule.minor))
    return Comparison(tuple(errors), tuple(warnings))


def refuse_mismatch(here: Versions, there: Versions, where: str = "the cluster") -> None:
    """Log harmless differences, and raise on the others.

    Args:
        here: As for ``compare``.
        there: As for ``compare``.
        where: As for ``compare``.

    Raises:
        VersionMismatchError: Names both sides and lists every difference that would break the run.
    """
    found = compare(here, there, where)
    if found.errors:
        sides = f"This machine: {here}\n{where[:1].upper()}{where[1:]}: {there}"
        listed = "\n".join(found.errors)
        raise VersionMismatchError(f"This machine and {where} would not understand each other.\n{listed}\n{sides}")
    for warning in found.warnings:
        logger.warning("%s", warning)


@dataclass(frozen=True, slots=True)
class _Rule:
    """What a difference in one package means; only major and minor version are looked at.

    Attributes:
        package: Its name for pip, and the field of ``Versions``.
        missing: Why the cluster needs it.
        major: Why another major version matters.
        minor: Why another minor version matters.
        major_breaks: Whether another major version is an error.
        lowest: Version below which the cluster is of no use; empty for none.
    """

    package: str
    missing: str
    major: str
    minor: str
    major_breaks: bool = True
    lowest: str = ""


_RAY_DIFFERS = "The two meet by the job API alone: driver and workers both run the Ray of the cluster."
_RULES = (
    _Rule(
        "ray",
        "The driver and the workers of the run use it.",
        _RAY_DIFFERS,
        _RAY_DIFFERS,
        major_breaks=False,
        lowest=LOWEST_RAY,
    ),
    _Rule(
        "cloudpickle",
        "Workers unpickle the function with it.",
        "What one major version pickles another does not promise to load.",
        "Functions load across minor versions as a rule, and not by promise.",
    ),
    _Rule(
        "torch",
        "Workers train with it.",
        "Modules and optimizers are pickled by the names of torch's classes, which a major version may move.",
        "Tensors are exchanged as bare memory and fit; modules that are pickled whole may lack what the other adds.",
    ),
    _Rule(
        "flytekit",
        "kfpytorch_ray is built on it.",
        "Inputs, decks and errors are pickled by the names of flytekit's classes, which a major version may move.",
        "Flyte's types may hold fields that the other side does not know.",
    ),
)


def _python(here: Versions, there: Versions, where: str) -> list[str]:
    if here.python and there.python and _release(here.python) == _release(there.python):
        return []
    mine, other = (_minor(side.python) for side in (here, there))
    return [
        explain(
            f"Python is {here.python or 'unknown'} {_HERE} and {there.python or 'unknown'} on {where}.",
            "Functions travel as the byte code of their Python, which another minor version does not run.",
            f"Run this with Python {other}, or a cluster with Python {mine}, for example by another image.",
        )
    ]


def _own_protocol(here: Versions, there: Versions, where: str) -> list[str]:
    if here.protocol is not None and here.protocol == there.protocol:
        return []
    return [
        explain(
            f"kfpytorch_ray is {_own(here)} {_HERE} and {_own(there)} on {where}.",
            "The driver on the cluster is part of it, and reads what is staged for it here.",
            f"Install the same version on the cluster: {_pip('kfpytorch_ray', here.kfpytorch_ray)}. Or send it: "
            f"{SEND_IT}.",
        )
    ]


def _own(side: Versions) -> str:
    if side.kfpytorch_ray is None and side.protocol is None:
        return "not installed"
    return f"{side.kfpytorch_ray or 'of unknown version'} (protocol {side.protocol or 'unknown'})"


def _own_version(here: Versions, there: Versions, where: str) -> list[str]:
    mine, other = here.kfpytorch_ray, there.kfpytorch_ray
    # Code that was sent has no version there.
    if None in (mine, other) or mine == other or here.protocol != there.protocol:
        return []
    return [
        explain(
            f"kfpytorch_ray is {mine} {_HERE} and {other} on {where}.",
            "They understand each other, and the run behaves as the cluster's version does.",
            f"Nothing must be done. For one version: {_pip('kfpytorch_ray', other)} here, or "
            f"{_pip('kfpytorch_ray', mine)} on the cluster.",
        )
    ]


def _missing(rule: _Rule, mine: str | None, where: str) -> str:
    return explain(
        f"{rule.package} is {mine or 'of an unknown version'} {_HERE} and not installed on {where}.",
        rule.missing,
        f"Install it on the cluster, in its image or by RayBackend(runtime_env=...): {_pip(rule.package, mine)}",
    )


def _too_old(rule: _Rule, other: str, where: str) -> str:
    return explain(
        f"{rule.package} is {other} on {where}.",
        f"kfpytorch_ray needs {rule.lowest} or newer.",
        f"Update the cluster: pip install '{rule.package}>={rule.lowest}'",
    )


def _differs(rule: _Rule, mine: str, other: str, where: str, why: str) -> str:
    return explain(
        f"{rule.package} is {mine} {_HERE} and {other} on {where}.",
        why,
        f"Have one version on both: {_pip(rule.package, other)} here, or {_pip(rule.package, mine)} on the cluster.",
    )


def _pip(package: str, version: str | None) -> str:
    # A local label such as +cpu is of an index of its own.
    return f"pip install {package}=={version.partition('+')[0]}" if version else f"pip install {package}"


def _release(version: str) -> tuple[int, ...]:
    """Major and minor version; a version that has none equals only its like."""
    found = re.match(r"v?(\d+)(?:\.(\d+))?", version)
    return (int(found[1]), int(found[2] or 0)) if found else ()


def _minor(version: str | None) -> str:
    return ".".join(map(str, _release(version))) if version else "of the same minor version"


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
