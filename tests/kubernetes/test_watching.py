"""A run that is followed is watched: on a real API server, with what stands between counting and breaking."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from doubles.api import Api, Document
from doubles.front import Asked, Front

from kfpytorch_ray import Elastic, KubeRayBackend, RunLostError, RunStatus, RunStoppedError, launch
from kfpytorch_ray.cluster.kube.client import Namespace
from kfpytorch_ray.cluster.kube.kinds import RAY_JOB
from kfpytorch_ray.cluster.kube.refusals import ExpiredError
from kfpytorch_ray.cluster.kube.watching import Watcher
from kfpytorch_ray.errors import AuthenticationError, ClusterUnreachableError
from kfpytorch_ray.run import Run
from kfpytorch_ray.testing import Relay, wait_until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.usefixtures("no_operator"),
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
]

JOB = "watched"
PODS = "app=watched"


def reached(namespace: str, kubeconfig: str) -> Namespace:
    return Namespace(namespace, kubeconfig=kubeconfig)


@pytest.fixture
def here(namespace: str, front: Front, tmp_path: Path) -> Namespace:
    """The namespace as it is reached by the front."""
    return reached(namespace, front.kubeconfig(tmp_path / "kubeconfig"))


@pytest.fixture
def job(api: Api, namespace: str) -> str:
    """A RayJob that nobody acts on."""
    spec = {"rayClusterSpec": {"headGroupSpec": {"rayStartParams": {}, "template": {"spec": {"containers": []}}}}}
    body = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": JOB}, "spec": spec}
    api.create("rayjobs", namespace, body)
    return JOB


def pod(name: str) -> Document:
    # No scheduler takes it.
    spec = {"containers": [{"name": "c", "image": "i"}], "schedulerName": "none"}
    return {"metadata": {"name": name, "labels": {"app": "watched"}}, "spec": spec}


def label(api: Api, namespace: str, value: int) -> None:
    assert api.patch("rayjobs", namespace, JOB, {"metadata": {"labels": {"value": str(value)}}})


def seen_label(seen: Watcher) -> int:
    found = seen.get(RAY_JOB, JOB)
    assert found is not None
    return int(found["metadata"].get("labels", {}).get("value", 0))


def watches(front: Front) -> tuple[int, int]:
    """How many there have been of RayJobs and of pods."""
    return front.counted("watch rayjobs"), front.counted("watch pods")


def wait_for_watches(seen: Watcher, front: Front, before: tuple[int, int] = (0, 0)) -> None:
    """Wait until there are more of both than before: each is begun when it is known how things are."""

    def there() -> bool:
        seen.get(RAY_JOB, JOB)
        seen.pods(PODS)
        return all(now > then for now, then in zip(watches(front), before, strict=True))

    wait_until(there, "two watches")


def test_a_watch_tells_what_changes_without_a_request(
    api: Api, namespace: str, here: Namespace, front: Front, job: str
) -> None:
    """A resource and pods that change, come and go; the API server is not asked however often one looks."""
    with Watcher(here) as seen:
        wait_for_watches(seen, front)
        front.asked.clear()
        for value in range(1, 4):
            label(api, namespace, value)
            wait_until(lambda value=value: seen_label(seen) == value, "the change")
        assert not seen.pods(PODS)
        for name in ("a", "b"):
            api.create("pods", namespace, pod(name))
        wait_until(lambda: {one.metadata.name for one in seen.pods(PODS)} == {"a", "b"}, "the pods")
        api.delete("pods", namespace, "a", gracePeriodSeconds=0)
        wait_until(lambda: [one.metadata.name for one in seen.pods(PODS)] == ["b"], "the pod to go")
        api.delete("rayjobs", namespace, JOB)
        wait_until(lambda: seen.get(RAY_JOB, JOB) is None, "the RayJob to go")
        assert not [str(asked) for asked in front.asked]


def test_without_the_block_the_server_is_asked(here: Namespace, front: Front, job: str) -> None:
    """One request for one look, and no watch."""
    seen = Watcher(here)
    assert seen.get(RAY_JOB, JOB) is not None
    assert seen.pods(PODS) == []
    with seen:
        pass
    assert seen.get(RAY_JOB, JOB) is not None
    assert [str(asked) for asked in front.asked] == [f"get rayjobs {JOB}", "list pods", f"get rayjobs {JOB}"]


def test_one_watch_follows_the_other(api: Api, namespace: str, here: Namespace, front: Front, job: str) -> None:
    """The server ends each after its time; the next goes on from there, with no list in between."""
    # Somebody asks during each, though it may get no CPU for a while.
    with Watcher(here, watch_s=4.0) as seen:
        wait_for_watches(seen, front)
        wait_until(lambda: seen_label(seen) == 0 and front.counted("watch rayjobs") > 2, "three watches")
        label(api, namespace, 1)
        wait_until(lambda: seen_label(seen) == 1, "the change")
    assert front.counted("list rayjobs") == 1


def test_what_nobody_asks_for_is_not_watched_any_more(
    api: Api, namespace: str, here: Namespace, front: Front, job: str
) -> None:
    """It ends with a watch in which nobody asked, and begins anew when somebody does."""
    with Watcher(here, watch_s=1.0) as seen:
        wait_for_watches(seen, front)
        before = front.counted("watch pods")
        wait_until(lambda: seen_label(seen) == 0 and len(watching()) == 1, "the other watch to end")
        ended = front.counted("watch pods")
        # One that was begun by then, in which somebody may have asked, and one in which nobody did.
        assert ended <= before + 2
        api.create("pods", namespace, pod("a"))
        wait_until(lambda: seen.pods(PODS), "the pod")
        wait_until(lambda: seen.pods(PODS) and front.counted("watch pods") > ended, "another watch")


def test_a_version_that_is_forgotten_is_listed_anew(
    api: Api, namespace: str, here: Namespace, front: Front, job: str
) -> None:
    """The server's own 410 to a version that it has compacted away."""
    with pytest.raises(ExpiredError, match="too old resource version"):  # noqa: SIM117
        with here.named(RAY_JOB, JOB).watch("1", 5.0) as watch:
            list(watch)
    front.asked.clear()
    spoilt: list[Asked] = []

    def spoil(asked: Asked) -> Asked:
        if asked.verb != "watch" or len(spoilt) == 2:
            return asked
        spoilt.append(asked)
        return asked.with_query(resourceVersion="1")

    front.change = spoil
    with Watcher(here) as seen:
        wait_until(lambda: seen.get(RAY_JOB, JOB) and front.counted("watch rayjobs") == 3, "a third watch")
        front.asked.clear()
        label(api, namespace, 1)
        wait_until(lambda: seen_label(seen) == 1, "the change")
        assert not front.asked
    assert len(spoilt) == 2


def test_a_connection_that_breaks_is_told_and_taken_up_again(
    api: Api, namespace: str, front: Front, job: str, tmp_path: Path
) -> None:
    """Whoever looks meanwhile is told that the server cannot be reached, and then what has changed."""
    with Relay("127.0.0.1", front.port) as relay:
        here = reached(namespace, front.kubeconfig(tmp_path / "kubeconfig", relay.address))
        with Watcher(here) as seen:
            wait_for_watches(seen, front)
            before = watches(front)
            relay.refuse()
            relay.drop()
            label(api, namespace, 1)
            wait_until(lambda: unreachable(seen), "the broken watch to be noticed")
            relay.heal()
            wait_until(lambda: not unreachable(seen) and seen_label(seen) == 1, "the change")
            wait_for_watches(seen, front, before)
            front.asked.clear()
            label(api, namespace, 2)
            wait_until(lambda: seen_label(seen) == 2, "the change")
            assert not front.asked


def unreachable(seen: Watcher) -> bool:
    try:
        seen.get(RAY_JOB, JOB)
    except ClusterUnreachableError:
        return True
    return False


def test_a_watch_that_is_silent_is_not_believed_for_ever(
    api: Api, namespace: str, here: Namespace, front: Front, job: str
) -> None:
    """As behind a link that was cut: after its time and some seconds the server is asked, which tells of the change."""
    with Watcher(here, watch_s=1.0) as seen:
        wait_for_watches(seen, front)
        front.held.set()
        label(api, namespace, 1)
        wait_until(lambda: seen_label(seen) == 1, "the change")
        front.held.clear()


def test_who_may_not_watch_asks(
    api: Api, namespace: str, stranger: str, allow: Callable[..., None], job: str, caplog: Any
) -> None:
    """Real RBAC without the verb watch: it is said once, and every look is a request."""
    allow(("ray.io", "rayjobs", ["get", "list"]))
    here = reached(namespace, stranger)
    with caplog.at_level("INFO", "kfpytorch_ray.cluster.kube.watching"), Watcher(here) as seen:
        wait_until(lambda: seen_label(seen) == 0 and caplog.messages, "the refusal")
        for value in (1, 2):
            label(api, namespace, value)
            assert seen_label(seen) == value
        with pytest.raises(AuthenticationError, match="list the pods"):
            seen.pods(PODS)
        wait_until(lambda: not watching(), "those that would watch to give up")
    told = [message for message in caplog.messages if "watch the RayJob" in message]
    assert len(told) == 1
    assert "403" in told[0]


def watching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "kfpytorch-ray-watch"]


def train(x: int) -> int:
    return x


@pytest.fixture
def start(backend: KubeRayBackend) -> Callable[[str], Run]:
    """Creates a RayJob by a kubeconfig."""

    def start(kubeconfig: str) -> Run:
        there = replace(backend, kubeconfig=kubeconfig)
        return launch(train, 1, elastic=Elastic(2, backend=there), wait=False)

    return start


class Following(threading.Thread):
    """Waits for a run's result."""

    def __init__(self, run: Run) -> None:
        super().__init__(daemon=True)
        self.run_ = run
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.run_.result()
        except Exception as error:
            self.error = error


@pytest.fixture
def follow() -> Iterator[Callable[[Run], Following]]:
    """Follows runs, to their end."""
    threads = []

    def follow(run: Run) -> Following:
        threads.append(Following(run))
        threads[-1].start()
        return threads[-1]

    yield follow
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def write(api: Api, namespace: str, run: Run, **status: Any) -> None:
    assert api.patch("rayjobs", namespace, f"{run.run_id}/status", {"status": status})


def head(uid: int) -> Document:
    made = pod(f"head-{uid}")
    made["metadata"]["labels"] = {"ray.io/cluster": "c", "ray.io/node-type": "head"}
    return made


def waits_for(api: Api, namespace: str, name: str, reason: str) -> None:
    waiting = {"state": {"waiting": {"reason": reason, "message": "m"}}, "name": "c", "image": "i", "imageID": ""}
    status = {"containerStatuses": [{**waiting, "ready": False, "restartCount": 0}]}
    assert api.patch("pods", namespace, f"{name}/status", {"status": status})


def test_a_run_is_followed_by_watches(
    api: Api,
    namespace: str,
    front: Front,
    start: Callable[[str], Run],
    follow: Callable[[Run], Following],
    tmp_path: Path,
    capsys: Any,
) -> None:
    """While it waits and while it runs nothing is asked for; its end is seen, too."""
    run = start(front.kubeconfig(tmp_path / "kubeconfig"))
    api.create("pods", namespace, head(1))
    waits_for(api, namespace, "head-1", "ErrImagePull")
    write(api, namespace, run, jobDeploymentStatus="Initializing", rayClusterName="c")
    following = follow(run)
    told = ""

    def said(words: str) -> bool:
        nonlocal told
        told += capsys.readouterr().err
        return words in told

    wait_until(lambda: said("ErrImagePull"), "the first reason")
    wait_until(lambda: front.counted("watch rayjobs") and front.counted("watch pods"), "two watches")
    # One that was about to be asked when they were not there yet.
    waits_for(api, namespace, "head-1", "SecondReason")
    wait_until(lambda: said("SecondReason"), "the second reason")
    front.asked.clear()
    for reason in ("ThirdReason", "FourthReason"):
        waits_for(api, namespace, "head-1", reason)
        wait_until(lambda reason=reason: said(reason), reason)
    write(api, namespace, run, jobDeploymentStatus="Running", jobStatus="RUNNING")
    write(api, namespace, run, jobDeploymentStatus="Complete", jobStatus="STOPPED")
    following.join(60)
    assert isinstance(following.error, RunStoppedError)
    # What follows is its end: looked at once more, and removed.
    assert not [str(asked) for asked in front.asked if asked.verb in ("list", "watch") and asked.resource == "pods"]
    assert [str(asked) for asked in front.asked[:1]] == [f"get rayjobs {run.run_id}"]
    assert not api.find("rayjobs", namespace)


def test_events_are_not_listed_at_every_look(
    api: Api, namespace: str, front: Front, start: Callable[[str], Run], tmp_path: Path
) -> None:
    """All of a namespace's are, so only where no pod says what it waits for, and seldom."""
    run = start(front.kubeconfig(tmp_path / "kubeconfig"))
    api.create("pods", namespace, head(1))
    write(api, namespace, run, jobDeploymentStatus="Initializing", rayClusterName="c")
    for _ in range(5):
        assert run.status() is RunStatus.PENDING
    assert (front.counted("list pods"), front.counted("list events")) == (5, 1)


def test_a_lost_connection_is_told_and_the_run_followed_on(
    api: Api,
    namespace: str,
    front: Front,
    start: Callable[[str], Run],
    follow: Callable[[Run], Following],
    tmp_path: Path,
    capsys: Any,
) -> None:
    """The link is cut while a run is followed, and restored: the run's end arrives."""
    with Relay("127.0.0.1", front.port) as relay:
        run = start(front.kubeconfig(tmp_path / "kubeconfig", relay.address))
        following = follow(run)
        wait_until(lambda: front.counted("watch rayjobs"), "a watch")
        relay.refuse()
        relay.drop()
        wait_until(lambda: "Trying again." in capsys.readouterr().err, "it to be told")
        relay.heal()
        wait_until(lambda: "can be reached again" in capsys.readouterr().err, "it to be told")
        write(api, namespace, run, jobDeploymentStatus="Complete", jobStatus="STOPPED")
        following.join(60)
        assert isinstance(following.error, RunStoppedError)


def test_a_job_that_somebody_deletes_is_lost(
    api: Api,
    namespace: str,
    front: Front,
    start: Callable[[str], Run],
    follow: Callable[[Run], Following],
    tmp_path: Path,
) -> None:
    """While it is followed: nobody will say any more how it ended."""
    run = start(front.kubeconfig(tmp_path / "kubeconfig"))
    write(api, namespace, run, jobDeploymentStatus="Running", jobStatus="RUNNING", rayClusterName="c")
    api.create("pods", namespace, head(1))
    following = follow(run)
    wait_until(lambda: front.counted("watch pods"), "a watch of its pods")
    api.delete("rayjobs", namespace, run.run_id)
    api.delete("pods", namespace, "head-1", gracePeriodSeconds=0)
    following.join(60)
    assert isinstance(following.error, RunLostError)
    assert "does not know it any more" in str(following.error)


@pytest.mark.parametrize("replaced", [True, False], ids=["replaced", "gone"])
def test_a_head_that_is_lost_ends_the_run(
    api: Api,
    namespace: str,
    front: Front,
    start: Callable[[str], Run],
    follow: Callable[[Run], Following],
    tmp_path: Path,
    replaced: bool,
) -> None:
    """KubeRay calls the RayJob Running, whether it has made another head or cannot; the error says what was lost."""
    run = start(front.kubeconfig(tmp_path / "kubeconfig"))
    api.create("pods", namespace, head(1))
    write(api, namespace, run, jobDeploymentStatus="Running", jobStatus="RUNNING", rayClusterName="c")
    following = follow(run)
    wait_until(lambda: front.counted("watch pods"), "a watch of its pods")
    assert following.is_alive()
    if replaced:
        api.create("pods", namespace, head(2))
    api.delete("pods", namespace, "head-1", gracePeriodSeconds=0)
    following.join(60)
    assert isinstance(following.error, RunLostError)
    assert "head pod" in str(following.error)
    assert not api.find("rayjobs", namespace)
