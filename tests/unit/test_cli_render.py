"""``kfpytorch-ray render``: manifests on standard output, what is lost on standard error, and nothing else needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from flytekit import ImageSpec
from flytekit.core.python_auto_container import get_registerable_container_image
from hypothesis import example, given
from hypothesis import strategies as st

from kfpytorch_ray import ConfigError, KubeRayBackend
from kfpytorch_ray.cli.exit_codes import ExitCode
from kfpytorch_ray.cli.group import main
from kfpytorch_ray.cli.manifest_text import as_json, as_yaml
from kfpytorch_ray.cli.targets import find_target
from kfpytorch_ray.images import settings_for
from kfpytorch_ray.rendering import VIA_KUBERNETES, Rendered, render

ROOT = Path(__file__).resolve().parents[2]
FLOW = """
import sys
from flytekit import ImageSpec, Resources, map_task, task
from kfpytorch_ray import CleanPodPolicy, Elastic, KubeRayBackend, PyTorch, RayBackend, RunPolicy, Worker

print("printed at import")
SCRIPT = "#!/bin/sh\\necho $LR\\n"

@task(task_config=Elastic(nnodes=2), environment={"LR": "1e-4", "SCRIPT": SCRIPT, "GREETING": "größer"})
def train(x: int) -> int:
    return x

@task(task_config=Elastic(nnodes=2, backend=KubeRayBackend(head_requests=Resources(cpu="3"))))
def on_kuberay(x: int) -> int:
    return x

@task(task_config=Elastic(nnodes=2, increase_shared_mem=False, backend="kuberay",
    run_policy=RunPolicy(clean_pod_policy=CleanPodPolicy.ALL)))
def lossy(x: int) -> int:
    return x

@task(task_config=PyTorch(worker=Worker(replicas=2)))
def replicas(x: int) -> int:
    return x

@task(task_config=Elastic(nnodes=2, start_method="forkserver", backend="kuberay"))
def forking(x: int) -> int:
    return x

@task(task_config=Elastic(nnodes=2), container_image=ImageSpec(name="train", registry="registry.example"))
def own_image(x: int) -> int:
    return x

@task(task_config=Elastic(nnodes=2), container_image="{{.image.other.fqn}}:{{.image.other.version}}")
def named_image(x: int) -> int:
    return x

@task
def ordinary(x: int) -> int:
    return x

def plain(x: int) -> int:
    return x

mapped = map_task(train)
"""


@pytest.fixture(autouse=True)
def own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command puts on the search path is gone after its test."""
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> str:
    """The example's task; the file sets the variable where it is not set."""
    monkeypatch.setenv("KFPYTORCH_RAY_BACKEND", "ray")
    return f"{ROOT / 'examples' / 'digits.py'}:train"


@pytest.fixture
def flow(tmp_path: Path) -> Path:
    """A file of tasks, of a module name that no other test has imported."""
    path = tmp_path / f"flow_{tmp_path.name}.py"
    path.write_text(FLOW)
    return path


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["render", *map(str, arguments)], prog_name="kfpytorch-ray")


def rendered(target: str, backend: str | None = None) -> Rendered:
    task = find_target(target).task
    return render(task, backend, settings=settings_for(task))


def lost_lines(done: Result) -> list[str]:
    return [line.removeprefix("lost: ") for line in done.stderr.splitlines() if line.startswith("lost: ")]


# What is printed


@pytest.mark.parametrize(("backend", "kind"), [("kuberay", "RayJob"), ("kubeflow", "PyTorchJob"), ("ray", "Pod")])
@pytest.mark.parametrize("form", [(), ("-o", "yaml"), ("-o", "json")])
def test_the_example_is_printed_as_it_is_rendered(digits: str, backend: str, kind: str, form: tuple[str, ...]) -> None:
    """Whatever the form: parsed again it is ``render()``'s manifest, and every lost field has a line."""
    done = cli(digits, "--backend", backend, *form)
    assert done.exit_code == ExitCode.OK, done.output
    expected = rendered(digits, backend)
    assert list(yaml.safe_load_all(done.stdout)) == list(expected.manifests)
    if "json" in form:
        assert json.loads(done.stdout) == expected.manifests[0]
    assert expected.manifests[0]["kind"] == kind
    assert lost_lines(done) == list(expected.lost)
    assert bool(expected.lost) == (backend == "kuberay")


def test_what_is_created_without_flyte_is_printed_too(digits: str) -> None:
    """With the image that is named; the note says that names are examples."""
    done = cli(digits, "--backend", "kuberay", "--via", "kubernetes", "--image", "registry.example/digits:1")
    assert done.exit_code == ExitCode.OK, done.output
    expected = render(find_target(digits).task, KubeRayBackend(image="registry.example/digits:1"), VIA_KUBERNETES)
    assert tuple(yaml.safe_load_all(done.stdout)) == expected.manifests
    assert lost_lines(done) == list(expected.lost)
    assert "note: what this package creates" in done.stderr


def test_keys_stand_where_people_look_for_them(digits: str) -> None:
    """Above all what it is and what it is called, in documents and containers."""
    text = cli(digits, "--backend", "kubeflow").stdout
    assert text.startswith("apiVersion: kubeflow.org/v1\nkind: PyTorchJob\nmetadata:\n  name: ")
    assert [line for line in text.splitlines() if not line.startswith((" ", "-"))] == [
        "apiVersion: kubeflow.org/v1",
        "kind: PyTorchJob",
        "metadata:",
        "spec:",
    ]
    assert "containers:\n          - name: pytorch\n            image: " in text


def test_the_backend_is_the_tasks_own_where_none_is_named(flow: Path) -> None:
    """And its options count, also where the same backend is named."""
    for arguments in ((), ("--backend", "kuberay")):
        (manifest,) = yaml.safe_load_all(cli(f"{flow}:on_kuberay", *arguments).stdout)
        (head,) = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
        assert head["resources"]["requests"]["cpu"] == "3"
    (manifest,) = yaml.safe_load_all(cli(f"{flow}:on_kuberay", "--backend", "kubeflow").stdout)
    assert manifest["kind"] == "PyTorchJob"
    (manifest,) = yaml.safe_load_all(cli(f"{flow}:replicas").stdout)
    assert manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"] == 2


def test_a_script_is_readable_and_a_number_in_text_stays_text(flow: Path) -> None:
    """kubectl reads ``1e-4`` without quotes as a number and refuses the variable."""
    lines = [line.strip() for line in cli(f"{flow}:train").stdout.splitlines()]
    assert "value: '1e-4'" in lines
    at = lines.index("- name: SCRIPT")
    assert lines[at + 1 : at + 4] == ["value: |", "#!/bin/sh", "echo $LR"]
    assert "value: größer" in lines


def test_standard_output_holds_nothing_else(flow: Path) -> None:
    """What the module prints goes to standard error; the bytes are UTF-8 whatever the terminal is set to."""
    done = process(flow.parent, f"{flow}:train", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert list(yaml.safe_load_all(done.stdout)) == list(rendered(f"{flow}:train").manifests)
    assert "value: größer" in done.stdout
    assert done.stderr.startswith("printed at import\nnote: ")


def test_a_lost_field_is_said_once(flow: Path) -> None:
    """One line for each, and not also in the log's words, of this task or others of the file."""
    done = process(flow.parent, f"{flow}:lossy")
    expected = rendered(f"{flow}:lossy")
    assert len(expected.lost) > 3
    imported, note, *lost = done.stderr.splitlines()
    assert imported == "printed at import"
    assert "Flyte 1.16.8" in note
    assert "example execution" in note
    assert lost == [f"lost: {text}" for text in expected.lost]


# Images


def test_the_default_image_can_be_named(flow: Path) -> None:
    """It is for tasks that name none."""
    done = cli(f"{flow}:train", "--image", "registry.example:5000/train:7")
    (manifest,) = yaml.safe_load_all(done.stdout)
    (container,) = manifest["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert container["image"] == "registry.example:5000/train:7"
    done = cli(f"{flow}:own_image", "--image", "registry.example/train:7")
    assert "image: registry.example/train:7" not in done.stdout


def test_an_image_spec_is_named_and_not_built(flow: Path) -> None:
    """There may be no builder and no registry where this runs."""
    done = cli(f"{flow}:own_image")
    assert done.exit_code == ExitCode.OK, done.output
    spec = find_target(f"{flow}:own_image").task.container_image  # type: ignore[union-attr]
    assert f"image: {spec.image_name()}\n" in done.stdout
    assert spec.image_name().startswith("registry.example/train:")


def test_image_specs_of_other_containers_are_named_too() -> None:
    """Of a pod template, whose containers flytekit looks up as it does the task's own."""
    spec = ImageSpec(name="beside", registry="registry.example")
    pods = SimpleNamespace(pod_spec=SimpleNamespace(containers=[SimpleNamespace(image=spec)]))
    settings = settings_for(SimpleNamespace(container_image=None, pod_template=pods))
    assert get_registerable_container_image(spec, settings.image_config) == spec.image_name()


@pytest.mark.parametrize(("image", "words"), [("train", "neither a tag nor a digest"), (__file__, "is a file")])
def test_an_image_needs_a_version(image: str, words: str, flow: Path) -> None:
    """And is a name: flytekit would build what a file says."""
    done = cli(f"{flow}:train", "--image", image)
    assert (done.exit_code, done.stdout) == (ExitCode.MISUSE, "")
    assert words in done.stderr
    with pytest.raises(ConfigError, match=words):
        settings_for(find_target(f"{flow}:train").task, image)


# What cannot be rendered


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("nobody", (), "has no 'nobody'; it has "),
        ("plain", (), "plain is a plain function. Why: "),
        ("plain", (), "or launch it as it is: kfpytorch-ray run "),
        ("ordinary", (), "ordinary is a task without task_config. Why: "),
        ("mapped", (), "expected a function or a function's task"),
        ("train", ("--backend", "pigeon"), "kubeflow, ray, kuberay"),
        ("train", ("--backend", "double"), "creates nothing on the way 'flyte'"),
        ("train", ("--backend", "ray", "--via", "kubernetes"), "creates nothing on the way 'kubernetes'"),
        ("forking", ("--backend", "kubeflow"), "start_method='forkserver'"),
        ("train", ("--via", "pigeon"), "--via"),
        ("train", ("-o", "toml"), "--output"),
        ("named_image", (), "flytekit's config file"),
    ],
)
def test_wrong_use_ends_with_2(double: Any, flow: Path, name: str, arguments: tuple[str, ...], words: str) -> None:
    """The message says what was wrong, and standard output stays empty, for kubectl may read it."""
    done = cli(f"{flow}:{name}", *arguments)
    assert (done.exit_code, done.stdout) == (ExitCode.MISUSE, "")
    assert words in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_a_task_of_upstreams_plugin_is_told_how_to_become_ours(tmp_path: Path) -> None:
    """It runs by upstream's classes, about which we can say nothing."""
    path = tmp_path / f"upstream_{tmp_path.name}.py"
    path.write_text(
        "from flytekit import task\nfrom flytekitplugins.kfpytorch import Elastic\n"
        "@task(task_config=Elastic(nnodes=2))\ndef train(x: int) -> int:\n    return x\n"
    )
    done = process(tmp_path, f"{path}:train")
    assert done.returncode == ExitCode.MISUSE
    assert "KFPYTORCH_RAY_ROUTE_UPSTREAM=1" in done.stderr
    done = process(tmp_path, f"{path}:train", KFPYTORCH_RAY_ROUTE_UPSTREAM="1")
    assert done.returncode == ExitCode.OK, done.stderr
    assert yaml.safe_load(done.stdout)["kind"] == "PyTorchJob"


# What it does without

SEALED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo") or (
        event == "open" and str(arguments[0]).endswith(("kubeconfig", "serviceaccount/token"))
    ):
        print("reached out:", event, arguments, file=sys.stderr)

sys.meta_path.insert(0, Absent())
sys.addaudithook(watch)
from kfpytorch_ray.cli.group import main
for backend in ("kuberay", "kubeflow", "ray"):
    main([*sys.argv[1:], "--backend", backend], prog_name="kfpytorch-ray", standalone_mode=False)
    print("---", flush=True)
print("imported:", sorted({"ray", "torch"} & set(sys.modules)), file=sys.stderr)
"""


def process(home: Path, *arguments: str, code: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    start = ["-c", code] if code else ["-m", "kfpytorch_ray.cli"]
    environment = {"PATH": "/usr/bin", "HOME": str(home), "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [sys.executable, *start, "render", *arguments],
        env=environment,
        cwd=home,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=240,
    )


def test_neither_ray_nor_torch_nor_a_cluster_is_needed(flow: Path) -> None:
    """Ray is not installed, torch is not loaded, no file of a cluster is read and nobody is asked."""
    kubeconfig = flow.parent / "kubeconfig"
    kubeconfig.write_text("apiVersion: v1\nkind: Config\n")
    done = process(flow.parent, f"{flow}:train", code=SEALED, KUBECONFIG=str(kubeconfig))
    assert done.returncode == 0, done.stderr
    kinds = [manifest["kind"] for manifest in yaml.safe_load_all(done.stdout.removesuffix("---\n"))]
    assert kinds == ["RayJob", "PyTorchJob", "Pod"]
    assert "reached out" not in done.stderr
    assert done.stderr.endswith("imported: []\n")


# The texts


def test_several_manifests_are_several_documents_or_one_list() -> None:
    """In their order; what they share is written out in each."""
    shared = {"app": "train"}
    several = [{"kind": "A", "apiVersion": "v1", "metadata": shared}, {"kind": "B", "spec": [shared]}]
    text = as_yaml(several)
    assert text.count("\n---\n") == 1
    assert "&" not in text
    assert list(yaml.safe_load_all(text)) == several
    assert json.loads(as_json(several)) == {"apiVersion": "v1", "kind": "List", "items": several}
    assert list(json.loads(as_json(several[:1]))) == ["apiVersion", "kind", "metadata"]


@pytest.mark.parametrize(
    "text",
    ["1e-4", "1E5", "12e4567", "08", "0o17", "0x1F", "1_000", ".5", "-.5e3", "y", "N", "yes", "null", "1"],
)
def test_what_kubectl_takes_for_something_else_is_quoted(text: str) -> None:
    """By the rules of YAML 1.1 and 1.2, and of go-yaml, which are not the same."""
    assert as_yaml([{"value": text}]) == f"value: '{text}'\n"


@pytest.mark.parametrize("text", ["4Gi", "500m", "0.0.0.0", "$MY_POD_IP", "1.2.3", "a.example/b:1", "yesterday"])
def test_other_texts_are_not(text: str) -> None:
    """They read better."""
    assert as_yaml([{"value": text}]) == f"value: {text}\n"


@example("\x85")
@example("a\nb\u2028")
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"])) | st.from_regex(r"[ \n\ta-c'\"|:#-]*"))
def test_every_text_arrives_as_it_is(text: str) -> None:
    """Whatever its line ends, quotes and leading spaces."""
    manifest = {"kind": "A", "list": [{"name": text, text: ["x", text]}]}
    assert list(yaml.safe_load_all(as_yaml([manifest]))) == [manifest]
    assert json.loads(as_json([manifest])) == manifest
