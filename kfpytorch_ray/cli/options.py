"""The options that several commands have, and what they mean.

No option takes a token or a header: what is typed is seen by everybody on the machine and kept by the shell. Headers
come from RAY_JOB_HEADERS, as for ``ray job``, and Ray's token from where Ray takes it (RAY_AUTH_TOKEN).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import rich_click as click
import yaml

from kfpytorch_ray.cli.reporting import JSON_KEY, VERBOSE_KEY
from kfpytorch_ray.config import BackendOptions, KubeflowBackend, KubeRayBackend, RayBackend
from kfpytorch_ray.errors import ConfigError, explain
from kfpytorch_ray.planning import amount_of
from kfpytorch_ray.runs import STORAGE_VARIABLE, storage_of
from kfpytorch_ray.storage import Storage

HEADERS_VARIABLE = "RAY_JOB_HEADERS"
"""A JSON object of HTTP headers, which Ray's own command line reads, too."""

OPTIONS_CLASSES: Mapping[str, type[Any]] = {kind.name: kind for kind in (RayBackend, KubeRayBackend, KubeflowBackend)}
"""The options objects of the backends that come with this package."""

_OPTIONS_OF = {"resources_per_node": "resources", "excludes": "exclude"}
"""Options that are not called as their field is."""

F = TypeVar("F", bound=Callable[..., Any])

_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d*)?)\s*([a-z]*)")
_SWITCHES = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def seconds(value: str | float) -> float:
    """Seconds of a number with a unit: ``90``, ``30s``, ``15m``, ``12h``, ``7d``, ``2w``."""
    found = _DURATION.fullmatch(str(value).strip().lower())
    if found is None or found[2] not in _SECONDS:
        msg = f"{value!r} is no time such as 90, 30s, 15m, 12h or 7d"
        raise click.BadParameter(msg)
    return float(found[1]) * _SECONDS[found[2]]


def pair(value: str) -> tuple[str, str]:
    """Name and value of ``NAME=VALUE``; the value may have a ``=`` of its own."""
    name, equals, text = value.partition("=")
    if not name or not equals:
        msg = f"{value!r} is not of the form NAME=VALUE"
        raise click.BadParameter(msg)
    return name, text


def amounts(value: str) -> dict[str, float]:
    """Ray resources of one node from ``CPU=8,GPU=1,memory=64Gi``; memory in bytes, as Kubernetes writes quantities."""
    found: dict[str, float] = {}
    for part in value.split(","):
        name, amount = pair(part.strip())
        try:
            found[name] = amount_of(amount)
        except (ValueError, ArithmeticError):
            found[name] = math.nan
        if not 0 <= found[name] < math.inf:
            msg = f"{part.strip()!r} is no amount such as CPU=8, GPU=1 or memory=64Gi"
            raise click.BadParameter(msg)
    return found


def runtime_environment(value: str) -> dict[str, Any]:
    """Ray's runtime environment from a YAML or JSON file, or from JSON that was typed."""
    try:
        text = value if value.lstrip().startswith("{") else Path(value).read_text(encoding="utf-8")
        # JSON is YAML.
        found = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        msg = f"{value!r} can be read neither as a file nor as JSON: {error}"
        raise click.BadParameter(msg) from error
    if not isinstance(found, dict):
        msg = f'{value!r} is no JSON object such as {{"pip": ["einops"]}}, nor a file with one'
        raise click.BadParameter(msg)
    return found


def certificates(value: str) -> bool | str:
    """What ``RayBackend(verify=...)`` takes: a file or folder of certificates, or whether to verify at all."""
    if value.lower() in _SWITCHES:
        return _SWITCHES[value.lower()]
    if not os.path.exists(value):
        msg = f"{value!r} is neither a file or folder of certificates nor 'false'"
        raise click.BadParameter(msg)
    return os.path.abspath(value)


@dataclass(frozen=True, slots=True)
class Reach:
    """How runs and their clusters are reached from here.

    Attributes:
        storage: URI of the storage; None: as the environment says.
        address: Of the cluster's job API; None: as the run's manifest says.
        verify: As in ``RayBackend``; None: its default.
    """

    storage: str | None = None
    address: str | None = None
    verify: bool | str | None = None

    def open_storage(self) -> Storage:
        """The storage.

        Raises:
            ConfigError: None is named.
            StorageError: There is no file system for it.
        """
        if not self.storage and not os.environ.get(STORAGE_VARIABLE):
            problem = explain(
                "no storage is named.",
                "In it runs leave what they are and bring.",
                f"Give --storage URI, such as s3://bucket/prefix, or set {STORAGE_VARIABLE}.",
            )
            raise ConfigError("kfpytorch-ray", (problem,))
        return storage_of(self.storage)

    def command(self, line: str) -> str:
        """A command line that does something else in the same storage, for a hint."""
        return f"kfpytorch-ray {line}{f' --storage {shlex.quote(self.storage)}' if self.storage else ''}"

    def given(self) -> dict[str, Any]:
        """The fields of an options object that say how its cluster is reached; only those that are given.

        Raises:
            ConfigError: RAY_JOB_HEADERS cannot be read.
        """
        found = {"address": self.address, "verify": self.verify, "headers": headers()}
        return {name: value for name, value in found.items() if value is not None}

    def options(self, backend: str) -> BackendOptions | None:
        """The options object by which a run of this backend is opened; None where the defaults do.

        Raises:
            ConfigError: The backend has no such options; or as ``given``.
        """
        # All that can be given is meant for Ray's job servers.
        return overlaid(backend, None, self.given()) if backend == RayBackend.name else None


def overlaid(backend: str, base: BackendOptions | None, given: Mapping[str, Any]) -> BackendOptions | None:
    """A backend's options with what was given laid over it.

    Args:
        backend: Its name.
        base: To start from; None: the backend's defaults.
        given: Values by field.

    Returns:
        The options; None where neither a base nor anything else is given.

    Raises:
        ConfigError: Lists every field that this backend does not have.
    """
    if not given:
        return base
    kind: Any = OPTIONS_CLASSES.get(backend) if base is None else type(base)
    known = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
    if unknown := [name for name in given if name not in known]:
        problems = (
            explain(
                f"--{_option_of(name)}: the backend {backend!r} has no such option.",
                "Options are those of the backend that is chosen.",
                "Leave it out, or choose another backend: --backend.",
            )
            for name in unknown
        )
        raise ConfigError("kfpytorch-ray", tuple(problems))
    before = {name: getattr(base, name) for name in known} if base is not None else {}
    made: BackendOptions = kind(**{**before, **given})
    return made


def _option_of(field: str) -> str:
    return _OPTIONS_OF.get(field, field.removesuffix("_s").replace("_", "-"))


def headers() -> dict[str, str] | None:
    """The HTTP headers that the environment names; None if it names none.

    Raises:
        ConfigError: They are no JSON object of strings. Does not repeat them, for they may hold a token.
    """
    text = os.environ.get(HEADERS_VARIABLE)
    if not text:
        return None
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        problem = explain(
            f"{HEADERS_VARIABLE} is no JSON object of strings.",
            "Its fields are sent as HTTP headers with every request.",
            'Write it as in {"Authorization": "..."}.',
        )
        raise ConfigError("kfpytorch-ray", (problem,))
    return found


def storage_option(command: F) -> F:
    """``--storage``."""
    text = f"Folder that this machine and the cluster share, as an fsspec URI. [env: {STORAGE_VARIABLE}]"
    return click.option("--storage", metavar="URI", help=text)(command)


def verify_option(command: F) -> F:
    """``--verify``."""
    text = "Certificates to trust for https://, or 'false' to trust anybody."
    return click.option("--verify", type=certificates, metavar="CA|false", help=text)(command)


def json_option(command: F) -> F:
    """``--json``: the command's ``as_json``, and the form in which errors are said."""
    text = "Print one JSON document on standard output."
    return click.option("--json", "as_json", is_flag=True, callback=_noted(JSON_KEY), help=text)(command)


def verbose_option(command: F) -> F:
    """``-v``: tracebacks, and what the package logs."""
    text = "Show tracebacks of errors, and log more."
    return click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_be_verbose, help=text)(command)


def reach_options(command: F) -> F:
    """``--storage``, ``--address`` and ``--verify`` of commands for runs that there are."""
    text = "The cluster's job API as it is reached from here, where that is not as the run was launched."
    return storage_option(click.option("--address", metavar="URL", help=text)(verify_option(verbose_option(command))))


def _noted(key: str) -> Callable[[click.Context, click.Parameter, Any], Any]:
    def note(ctx: click.Context, _parameter: click.Parameter, value: Any) -> Any:
        if value:
            ctx.meta[key] = value
        return value

    return note


def _be_verbose(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[VERBOSE_KEY] = True
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("kfpytorch_ray").setLevel(logging.INFO)
