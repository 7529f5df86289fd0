"""The versions of two sides, judged without a cluster."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfpytorch_ray.cluster.remote.versions import LOWEST_RAY, PROTOCOL, Versions, compare, here, refuse_mismatch
from kfpytorch_ray.errors import VersionMismatchError

ROOT = Path(__file__).resolve().parents[2]

MINE = Versions("3.11.7", "2.60.0", "2.13.0+cpu", "1.16.31", "3.1.2", "0.1.0", 1)

HARMLESS = [
    ({"python": "3.11.9"}, "a patch of Python"),
    ({"ray": "2.60.3"}, "a patch of ray"),
    ({"torch": "2.13.0+cu128"}, "another build of torch"),
    ({"torch": "2.13.1"}, "a patch of torch"),
    ({"flytekit": "1.16.2"}, "a patch of flytekit"),
    ({"cloudpickle": "3.1.0"}, "a patch of cloudpickle"),
    ({"kfpytorch_ray": None}, "our code was sent, not installed"),
]

WARNINGS = [
    ({"ray": "2.55.1"}, "ray is 2.60.0 on this machine and 2.55.1 on", "pip install ray==2.55.1 here"),
    (
        {"ray": "3.0.0.dev0"},
        "ray is 2.60.0 on this machine and 3.0.0.dev0 on",
        "pip install ray==2.60.0 on the cluster",
    ),
    (
        {"torch": "2.9.1+cu128"},
        "torch is 2.13.0+cpu on this machine and 2.9.1+cu128 on",
        "pip install torch==2.9.1 here",
    ),
    ({"flytekit": "1.17.0"}, "flytekit is 1.16.31 on this machine and 1.17.0 on", "pip install flytekit==1.17.0 here"),
    (
        {"cloudpickle": "3.0.0"},
        "cloudpickle is 3.1.2 on this machine and 3.0.0 on",
        "pip install cloudpickle==3.0.0 here",
    ),
    ({"kfpytorch_ray": "0.2.0"}, "kfpytorch_ray is 0.1.0 on this machine and 0.2.0 on", "kfpytorch_ray==0.2.0 here"),
]

ERRORS = [
    ({"python": "3.12.1"}, "Python is 3.11.7 on this machine and 3.12.1 on", "Run this with Python 3.12"),
    ({"python": None}, "Python is 3.11.7 on this machine and unknown on", "a cluster with Python 3.11"),
    ({"ray": "2.48.0"}, "ray is 2.48.0 on", f"pip install 'ray>={LOWEST_RAY}'"),
    ({"ray": None}, "ray is 2.60.0 on this machine and not installed on", "pip install ray==2.60.0"),
    ({"torch": "1.13.1"}, "torch is 2.13.0+cpu on this machine and 1.13.1 on", "pip install torch==1.13.1 here"),
    ({"torch": None}, "torch is 2.13.0+cpu on this machine and not installed on", "pip install torch==2.13.0"),
    ({"flytekit": "2.0.0"}, "flytekit is 1.16.31 on this machine and 2.0.0 on", "pip install flytekit==2.0.0 here"),
    ({"flytekit": None}, "flytekit is 1.16.31 on this machine and not installed on", "pip install flytekit==1.16.31"),
    (
        {"cloudpickle": "2.2.1"},
        "cloudpickle is 3.1.2 on this machine and 2.2.1 on",
        "cloudpickle==3.1.2 on the cluster",
    ),
    ({"cloudpickle": None}, "cloudpickle is 3.1.2 on this machine and not installed", "pip install cloudpickle==3.1.2"),
    (
        {"protocol": 2},
        "0.1.0 (protocol 1) on this machine and 0.1.0 (protocol 2) on",
        "pip install kfpytorch_ray==0.1.0",
    ),
    ({"protocol": None}, "0.1.0 (protocol 1) on this machine and 0.1.0 (protocol unknown) on", '"py_modules"'),
    (
        {"protocol": None, "kfpytorch_ray": None},
        "kfpytorch_ray is 0.1.0 (protocol 1) on this machine and not",
        "py_mod",
    ),
    ({"protocol": 2, "kfpytorch_ray": "0.2.0"}, "0.1.0 (protocol 1) on this machine and 0.2.0 (protocol 2)", "Or send"),
]


def named(rows: list[tuple[dict[str, object], str, str]]) -> list[str]:
    return [", ".join(f"{name} {value}" for name, value in changes.items()) for changes, *_ in rows]


@pytest.mark.parametrize("changes", [row[0] for row in HARMLESS], ids=[row[1] for row in HARMLESS])
def test_a_harmless_difference_is_not_mentioned(changes: dict[str, object]) -> None:
    """Nobody needs to read of patch versions and builds."""
    found = compare(MINE, dataclasses.replace(MINE, **changes))
    assert (found.errors, found.warnings) == ((), ())


@pytest.mark.parametrize(("changes", "what", "fix"), WARNINGS, ids=named(WARNINGS))
def test_a_difference_that_may_matter_is_a_warning(
    changes: dict[str, object], what: str, fix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It names both sides, says why, and which pip command makes them equal; the run goes on."""
    there = dataclasses.replace(MINE, **changes)
    found = compare(MINE, there, "the cluster at https://head:8265")
    assert found.errors == ()
    (warning,) = found.warnings
    assert what in warning
    assert " on the cluster at https://head:8265" in warning
    assert fix in warning.partition("\nFix: ")[2]
    assert "\nWhy: " in warning
    with caplog.at_level(logging.WARNING):
        refuse_mismatch(MINE, there, "the cluster at https://head:8265")
    assert caplog.messages == [warning]


@pytest.mark.parametrize(("changes", "what", "fix"), ERRORS, ids=named(ERRORS))
def test_a_difference_that_breaks_the_run_is_an_error(changes: dict[str, object], what: str, fix: str) -> None:
    """It is said once, with both sides, why and the fix."""
    there = dataclasses.replace(MINE, **changes)
    found = compare(MINE, there)
    assert found.warnings == ()
    (error,) = found.errors
    assert what in error
    assert fix in error.partition("\nFix: ")[2]
    assert "\nWhy: " in error
    with pytest.raises(VersionMismatchError) as caught:
        refuse_mismatch(MINE, there)
    assert error in str(caught.value)
    assert f"\nThis machine: {MINE}\nThe cluster: {there}" in str(caught.value)


def test_everything_that_differs_is_said_at_once() -> None:
    """A user who has to make a new image makes it once."""
    there = dataclasses.replace(MINE, python="3.12.1", torch=None, flytekit="1.20.0", cloudpickle="2.0.0")
    found = compare(MINE, there)
    assert [text.split()[0] for text in found.errors] == ["Python", "cloudpickle", "torch"]
    assert [text.split()[0] for text in found.warnings] == ["flytekit"]


def test_nothing_known_of_the_other_side_is_an_error() -> None:
    """An answer without versions is not taken for equal ones."""
    with pytest.raises(VersionMismatchError, match="The cluster: no versions are known"):
        refuse_mismatch(MINE, Versions())


def version(smallest: int = 0) -> st.SearchStrategy[str]:
    suffix = st.sampled_from(["", ".0", ".7", ".0rc1", ".0.dev0", ".1+cu128", "+local"])
    numbers = st.tuples(st.integers(smallest, smallest + 5), st.integers(49, 99), suffix)
    return numbers.map(lambda parts: f"{parts[0]}.{parts[1]}{parts[2]}")


SIDES = st.builds(
    Versions,
    version(3),
    version(2),
    version(),
    version(),
    version(),
    st.none() | version(),
    st.integers(1, 9),
)


@given(SIDES)
def test_equal_versions_never_complain(side: Versions) -> None:
    """Whatever they are: two equal sides that have all that is needed fit."""
    found = compare(side, side)
    assert (found.errors, found.warnings) == ((), ())


@given(SIDES, SIDES)
def test_both_directions_agree(one: Versions, other: Versions) -> None:
    """Whether two sides fit does not depend on which of them is the laptop."""
    there, back = compare(one, other), compare(other, one)
    assert (len(there.errors), len(there.warnings)) == (len(back.errors), len(back.warnings))


@given(SIDES | st.just(Versions()))
def test_versions_survive_json(side: Versions) -> None:
    """What one side writes the other reads."""
    assert Versions.from_json(json.loads(json.dumps(side.to_json()))) == side


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"python": "3.11.7", "jax": "0.5"}, Versions("3.11.7")),
        ({"torch": None, "ray": 2.6, "protocol": "1", "python": ""}, Versions("")),
        ({"protocol": True}, Versions()),
        ([], Versions()),
        (None, Versions()),
    ],
    ids=["a field of a newer side", "other types", "true is no number", "a list", "null"],
)
def test_json_of_another_release_is_read_as_far_as_it_goes(value: object, expected: Versions) -> None:
    """The comparison, and not its parser, says what is missing."""
    assert Versions.from_json(value) == expected


def test_the_versions_here_are_those_of_this_environment() -> None:
    """All of them are found, and the protocol is that of the code."""
    versions = here()
    assert versions.python == ".".join(map(str, sys.version_info[:3]))
    assert None not in versions.to_json().values()
    assert versions.protocol == PROTOCOL
    assert compare(versions, versions).errors == ()


def test_looking_imports_neither_ray_nor_torch() -> None:
    """The probe on the cluster answers before it has loaded anything heavy."""
    code = (
        "import sys\nfrom kfpytorch_ray.cluster.remote.versions import here\nhere()\n"
        "print({'ray', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, cwd=ROOT
    )
    assert done.stdout.strip() == "set()"


def test_the_lowest_ray_is_that_of_pyproject() -> None:
    """The constant and the dependency are changed together."""
    assert f'    "ray>={LOWEST_RAY}",\n' in (ROOT / "pyproject.toml").read_text()


def test_an_error_that_the_lowest_ray_lacks_is_not_imported() -> None:
    """It knows no tokens."""
    code = (
        "import ray.exceptions, ray.job_submission\n"
        "del ray.exceptions.AuthenticationError\n"
        "from kfpytorch_ray.cluster.remote.client import JobClient\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)
