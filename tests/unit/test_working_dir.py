"""What of a working directory travels, compared with what Ray packs."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from ray._private import ray_constants
from ray._private.runtime_env.packaging import create_package, get_uri_for_directory

from kfpytorch_ray.cluster.remote.packing import Fate, entries_of
from kfpytorch_ray.cluster.remote.working_dir import JOB_API_LIMIT_BYTES, WorkingDir, check, pattern_for, survey
from kfpytorch_ray.config import DEFAULT_WORKING_DIR_EXCLUDES
from kfpytorch_ray.errors import ConfigError, WorkingDirError

MIB = 2**20
QUIET = logging.getLogger("quiet")
QUIET.setLevel(logging.CRITICAL + 1)


def packed_by_ray(folder: Path, excludes: tuple[str, ...] = ()) -> tuple[list[str], int]:
    """The names in the zip that Ray makes for a job, and its size."""
    every = [*ray_constants.get_runtime_env_default_excludes(), *excludes]
    obeyed = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "package.zip"
        create_package(str(folder), package, include_gitignore=obeyed, excludes=every, logger=QUIET)
        with zipfile.ZipFile(package) as archive:
            return sorted(archive.namelist()), package.stat().st_size


def sent(folder: Path, excludes: tuple[str, ...] = ()) -> list[str]:
    return sorted(entry.name for entry in entries_of(folder, excludes) if entry.fate is Fate.SENT)


def problems(folder: Path, excludes: tuple[str, ...] = ()) -> list[tuple[str, Fate]]:
    return [(entry.name, entry.fate) for entry in survey(folder, excludes).problems]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """An empty folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    return folder


def write(folder: Path, **files: str | int) -> None:
    """Files by name, with their text or their size."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            with path.open("wb") as file:
                file.truncate(content)
        else:
            path.write_text(content)


# Trees: a folder is a dict, a file its size, anything else a marker.
NAMES = st.sampled_from(["a", "b", "c.py", "data", "é", ".git", ".hidden", "venv", "x y", "#h", "[z]"])
PATTERNS = st.sampled_from(
    ["*", "a", "/a", "a/", "b/c.py", "*.py", "!c.py", "!a", "!venv", "**/b", "data/**", "a/*", ".*", "# a", "", "  ",
     "é", "\\#h", "[ab]", "x y", "x\\ y", "?", "./a", ".", "/", "a/b/", "\\[z\\]"]
)  # fmt: skip
LINES = st.lists(PATTERNS, max_size=4).map("\n".join)
TARGETS = st.sampled_from(
    [".", "..", "a", "../a", "../b", "../data", "b/c.py", "../../b", "gone", "c.py", "c.py/x", ""]
)
LEAVES = st.one_of(
    st.integers(0, 3000),
    TARGETS.map(lambda target: ("link", target)) | st.just(("link", "")),  # to itself
    st.sampled_from([("special", stat.S_IFIFO), ("special", stat.S_IFSOCK)]),
)
IGNORE_FILES = st.dictionaries(st.sampled_from([".gitignore", ".rayignore"]), LINES, max_size=2)


def folders(children: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda files, ignore: files | ignore, st.dictionaries(NAMES, children, max_size=5), IGNORE_FILES)


TREES = folders(st.recursive(LEAVES, folders, max_leaves=12))


def make(folder: Path, tree: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    for name, node in tree.items():
        path = folder / name
        match node:
            case dict():
                make(path, node)
            case int():
                path.write_bytes(b"x" * node)
            case str():
                path.write_text(node)
            case ("link", target):
                path.symlink_to(target or name)
            case ("special", kind):
                os.mknod(path, kind | 0o600)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(TREES, st.lists(PATTERNS, max_size=3), st.sampled_from([None, "0", "1"]), st.sampled_from([None, "", "a"]))
def test_what_is_surveyed_is_what_ray_packs(
    tree: dict[str, Any], excludes: list[str], ignore_gitignore: str | None, own_excludes: str | None
) -> None:
    """Names, number and size are those of Ray's package, whatever files, links, ignore files and settings there are."""
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        for name, value in [
            (ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, ignore_gitignore),
            ("RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES", own_excludes),
        ]:
            if value is None:
                patch.delenv(name, raising=False)
            else:
                patch.setenv(name, value)
        folder = Path(scratch) / "project"
        make(folder, tree)
        found = survey(folder, excludes)
        # In a circle of folders Ray goes round forty times.
        assume(not any(entry.fate is Fate.CIRCLE and (folder / entry.name).is_dir() for entry in found.problems))
        names, size_bytes = packed_by_ray(folder, tuple(excludes))
        assert sent(folder, tuple(excludes)) == names
        assert found.files == sum(not name.endswith("/") for name in names)
        assert found.size_bytes == size_bytes


def test_the_project_of_a_user(project: Path) -> None:
    """Environments, caches and data stay here; the log says what goes, how much, and what stays and why."""
    write(
        project,
        **{"train.py": "x", "lib/model.py": 2 * MIB, ".git/HEAD": "x", ".venv/lib/torch.so": "x", "data/a.bin": MIB},
        **{"lib/__pycache__/model.pyc": "x", "core": 3 * MIB, ".gitignore": "data/\n", ".rayignore": "core\n"},
    )
    found = survey(project, DEFAULT_WORKING_DIR_EXCLUDES)
    check(found, 100 * MIB)
    assert found.describe() == (
        f"Sending {project} to the cluster: 4 files, 2.0 MiB. "
        "Left out: .git, .venv, core (3.0 MiB, by .rayignore), data (1.0 MiB, by .gitignore)."
    )
    assert [entry.name for entry in found.largest] == ["lib/model.py", ".gitignore", ".rayignore", "train.py"]
    assert packed_by_ray(project, DEFAULT_WORKING_DIR_EXCLUDES)[1] == found.size_bytes


def test_the_log_line_stays_short(project: Path) -> None:
    """Eight names and a number, on one line, whatever the names are."""
    write(project, **{f"{number:02}.tmp": "" for number in range(20)}, **{"a\nb.tmp": ""})
    described = survey(project, ("*.tmp",)).describe()
    assert described.endswith("05.tmp (0 B), 06.tmp (0 B), 07.tmp (0 B) and 13 more.")
    assert "0 files" in described
    assert "\n" not in survey(project, ("a*",)).describe()


def test_an_ignore_file_that_leaves_out_everything_is_said(project: Path) -> None:
    """Unlike git, Ray does not look below a folder that ``*`` matches, and ``!*.py`` brings nothing back."""
    write(project, **{"train.py": "x", ".gitignore": "*\n!*.py\n!*/\n"})
    assert packed_by_ray(project)[0] == []
    described = survey(project).describe()
    assert (
        described == f"Nothing of {project} is sent to the cluster: a pattern of .gitignore matches the whole folder."
    )


def test_the_five_largest_files_are_known(project: Path) -> None:
    """Largest first, wherever they lie; those that are left out do not count."""
    sizes = {f"{name}/{size}.bin": size for name, size in zip("abcdefgh", [3, 900, 20, 7, 800, 1, 50, 60], strict=True)}
    write(project, **sizes, **{"data/most.bin": 5000})
    found = survey(project, ("data",))
    assert [entry.size_bytes for entry in found.largest] == [900, 800, 60, 50, 20]
    assert found.files == 8


def refusal(found: WorkingDir, limit_bytes: int = 100 * MIB) -> str:
    with pytest.raises(WorkingDirError) as caught:
        check(found, limit_bytes)
    assert isinstance(caught.value, ConfigError)
    for problem in caught.value.problems:
        assert problem.count("\nWhy: ") == problem.count("\nFix: ") == 1
    return str(caught.value)


def test_a_folder_that_is_too_large_is_refused(project: Path) -> None:
    """The largest files are named, with a pattern that leaves the first out and the limit that would let it pass."""
    write(project, **{"train.py": "x", "weights/a [1].bin": 60 * MIB, "weights/b.bin": 20 * MIB})
    found = survey(project)
    said = refusal(found, 50 * MIB)
    assert "80.0 MiB would be sent, more than max_working_dir_bytes=52428800 (50.0 MiB)." in said
    assert "It holds 3 files; the largest are weights/a [1].bin (60.0 MiB), weights/b.bin (20.0 MiB), train.py" in said
    assert f"max_working_dir_bytes={found.size_bytes}" in said
    check(found, found.size_bytes)
    check(survey(project, (pattern_for("weights/a [1].bin"),)), 50 * MIB)


def test_no_limit_of_ours_is_above_that_of_the_job_api(project: Path) -> None:
    """Its server refuses more than 100 MiB, but only after Ray has packed and sent all of it."""
    write(project, **{"a.bin": JOB_API_LIMIT_BYTES})
    said = refusal(survey(project), 10 * JOB_API_LIMIT_BYTES)
    assert "Ray's job server takes no more than 100.0 MiB" in said
    assert "max_working_dir_bytes" not in said


@pytest.mark.parametrize("name", ["a", "a b", "#a", "!a", "[ab]", "a*", "a?", "d/[x]", "\\", "a\\b", "é", "a]", " a "])
def test_the_pattern_for_a_name_matches_it_alone(name: str, project: Path) -> None:
    """What an error tells the user to add does what it says."""
    write(project, **{name: "x", "keep/a": "x", "ab": "x", "b": "x"})
    assert sent(project, (pattern_for(name),)) == sorted({"keep/a", "ab", "b"} - {name})


def test_links_are_followed(project: Path) -> None:
    """What is behind a link travels, also from outside the folder; two links to one folder are two copies."""
    write(project.parent, **{"shared/x.py": "x", "project/train.py": "x"})
    (project / "one").symlink_to("../shared")
    (project / "two").symlink_to(project.parent / "shared")
    assert sent(project) == ["one/x.py", "train.py", "two/x.py"]
    check(survey(project), MIB)


def test_broken_links_are_named_with_their_targets(project: Path) -> None:
    """Ray would leave them out without a word. One that is left out is nobody's business."""
    (project / "old").symlink_to("/no/such/place")
    write(project, **{"sub/x": "x"})
    (project / "sub/lib").symlink_to("../moved")
    assert packed_by_ray(project)[0] == ["sub/x"]
    said = refusal(survey(project))
    assert "Links that lead nowhere: old -> /no/such/place, sub/lib -> ../moved" in said
    assert "'/old'" in said
    check(survey(project, ("old", "lib")), MIB)


def test_links_that_lead_in_a_circle_are_named(project: Path) -> None:
    """To itself, to a folder above, or through two folders: Ray would pack what is behind them forty times."""
    write(project, **{"a/x": "x", "b/x": "x"})
    (project / "self").symlink_to("self")
    (project / "a/up").symlink_to("..")
    assert len(packed_by_ray(project, ("b", "self"))[0]) == 41
    assert problems(project, ("b",)) == [("a/up", Fate.CIRCLE), ("self", Fate.CIRCLE)]
    (project / "a/up").unlink()
    (project / "a/other").symlink_to("../b")
    (project / "b/other").symlink_to("../a")
    assert [name for name, _ in problems(project, ("self",))] == ["a/other/other", "b/other/other"]
    assert "in a circle: a/other/other -> ../a, b/other/other -> ../b" in refusal(survey(project, ("self",)))
    check(survey(project, ("self", "other")), MIB)


def test_what_is_no_file_is_named(project: Path) -> None:
    """Ray opens a fifo and waits there forever; sockets it leaves out."""
    os.mkfifo(project / "pipe")
    os.mknod(project / "socket", stat.S_IFSOCK | 0o600)
    (project / "zero").symlink_to("/dev/zero")
    said = refusal(survey(project))
    assert "Neither files nor folders: pipe (fifo), socket (socket), zero (device)" in said
    check(survey(project, ("pipe", "socket", "zero")), MIB)


@contextlib.contextmanager
def no_superuser() -> Iterator[None]:
    """Lose the right to read everything for a while."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user reaches."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        for path in folder.iterdir():
            path.chmod(0o755)


@pytest.mark.parametrize("name", ["secret.py", "folder", "folder/.gitignore"])
def test_what_may_not_be_read_is_named(name: str, open_folder: Path) -> None:
    """A file, a folder or an ignore file: Ray would fail in the middle of packing."""
    write(open_folder, **{"secret.py": "x", "folder/.gitignore": "", "folder/x": "x"})
    with no_superuser():
        assert problems(open_folder) == []
    (open_folder / name).chmod(0)
    with no_superuser():
        found = survey(open_folder)
        with pytest.raises(PermissionError):
            submit_to_ray(open_folder)
    assert [(entry.name, entry.fate) for entry in found.problems] == [(name, Fate.UNREADABLE)]
    assert f"What may not be read: {name} (Permission denied)" in refusal(found)


def test_a_pattern_does_not_help_against_a_folder_that_may_not_be_read(open_folder: Path) -> None:
    """Ray looks for ignore files in it before it looks whether it is left out; a file is simply left out."""
    write(open_folder, **{"secret.py": "x", "folder/x": "x"})
    for name in ("secret.py", "folder"):
        (open_folder / name).chmod(0)
    with no_superuser():
        assert problems(open_folder, ("secret.py", "folder")) == [("folder", Fate.UNREADABLE)]
        with pytest.raises(PermissionError):
            submit_to_ray(open_folder, ("secret.py", "folder"))


def submit_to_ray(folder: Path, excludes: tuple[str, ...] = ()) -> None:
    """What Ray does with a folder when a job is submitted: it hashes it, and packs it."""
    get_uri_for_directory(str(folder), include_gitignore=True, excludes=list(excludes))
    packed_by_ray(folder, excludes)


@pytest.mark.parametrize(
    ("content", "detail"),
    [(b"*.log\n!\n", "'!'"), (b"[z-a]\n", "'[z-a]'"), (b"caf\xe9\n", "'utf-8' codec can't decode byte 0xe9")],
    ids=["nothing negated", "range backwards", "not utf-8"],
)
def test_ignore_files_that_ray_cannot_read_are_named(content: bytes, detail: str, project: Path) -> None:
    """With the line; Ray fails with an error that names neither, also for those in folders that are left out."""
    write(project, **{"train.py": "x", "data/x": "x"})
    (project / "data/.gitignore").write_bytes(content)
    with pytest.raises(Exception, match=r".+") as caught:
        submit_to_ray(project, ("data",))
    assert ".gitignore" not in str(caught.value)
    assert problems(project, ("data",)) == [("data/.gitignore", Fate.BAD_PATTERN)]
    said = refusal(survey(project, ("data",)))
    assert f"What cannot be read as gitignore patterns: data/.gitignore ({detail}" in said


def test_excludes_that_ray_cannot_read_are_named(project: Path) -> None:
    """Only the wrong pattern, not those around it."""
    with pytest.raises(IndexError):
        submit_to_ray(project, ("data", "!"))
    assert "gitignore patterns: excludes ('!')" in refusal(survey(project, ("data", "!", "*.bin")))


def test_names_that_are_not_utf8_are_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray cannot hash them. The message can be written to any log."""
    # Ray's own logs the name as it is, which pytest-xdist cannot hand on.
    monkeypatch.setattr(logging.getLogger(create_package.__module__), "disabled", True)
    for name in (b"caf\xe9.py", b"d\xff"):
        path = os.path.join(os.fsencode(project), name)
        os.mkdir(path) if name.startswith(b"d") else os.close(os.open(path, os.O_CREAT))
    with pytest.raises(UnicodeEncodeError):
        submit_to_ray(project)
    said = refusal(survey(project))
    assert said.isascii()
    assert "Names that are not UTF-8: 'caf\\udce9.py', 'd\\udcff'" in said
    check(survey(project, ("caf*", "d*")), MIB)


@pytest.mark.parametrize(("name", "why"), [("gone", "No such file"), ("file", "not a folder"), ("file/x", "Not a dir")])
def test_a_folder_that_is_none_is_refused(name: str, why: str, project: Path) -> None:
    """The absolute path is named, and how to send nothing."""
    write(project, file="x")
    with pytest.raises(WorkingDirError, match=why) as caught:
        survey(project / name)
    assert str(project / name) in str(caught.value)
    assert 'RayBackend(working_dir="")' in str(caught.value)


def test_every_problem_is_said_at_once(project: Path) -> None:
    """Each with its reason and its fix, in one message."""
    write(project, **{"a.bin": MIB})
    (project / "gone").symlink_to("nowhere")
    os.mkfifo(project / "pipe")
    said = refusal(survey(project), 1000)
    assert said.startswith(f"RayBackend(working_dir={str(project)!r}): 3 problems\n  - 1.0 MiB would be sent")
    assert said.count("\n    Why: ") == said.count("\n    Fix: ") == 3
