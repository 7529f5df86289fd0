"""Steps and metrics from a worker to the driver's history: by a mapped file, pulses, and the end of a round."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kfpytorch_ray.cluster.metrics_source import MOST_AT_A_TIME, MetricsSource
from kfpytorch_ray.heartbeat import PAGE_NAME, PAGE_VARIABLE, HeartbeatPage, _own_slot, progress
from kfpytorch_ray.metric_page import METRICS_NAME, MOST_METRICS, MetricPage
from kfpytorch_ray.metrics import MetricHistory, MetricPoint, thinned


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MetricPage]:
    """Of an agent in its round 0, of which this process is the first worker."""
    with HeartbeatPage.create(tmp_path / PAGE_NAME, 2) as heartbeat:
        heartbeat.start_round(0)
        made = MetricPage.create(tmp_path / METRICS_NAME)
        made.start_round(0)
        monkeypatch.setenv(PAGE_VARIABLE, f"{tmp_path / PAGE_NAME}:0")
        _own_slot.cache_clear()
        yield MetricPage.open(tmp_path / METRICS_NAME)
        _own_slot.cache_clear()


def test_what_the_first_worker_tells_is_read(page: MetricPage) -> None:
    """Step, steps in all and metrics, each of them where it was told; NaN, too, which is what people look for."""
    progress(1, total=10, loss=0.5)
    progress(2)
    progress(3, total=10, loss=math.nan, accuracy=True)
    first, second, third = page.read(0, 0)
    assert (first.step, first.total, dict(first.values)) == (1, 10, {"loss": 0.5})
    assert (second.step, second.total, dict(second.values)) == (2, None, {})
    assert math.isnan(third.values["loss"])
    assert third.values["accuracy"] == 1.0
    assert [point.number for point in page.read(0, 1)] == [1, 2]
    assert first.at <= second.at <= third.at


def test_other_workers_tell_of_their_step_only(
    page: MetricPage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 is the first of its node."""
    monkeypatch.setenv(PAGE_VARIABLE, f"{tmp_path / PAGE_NAME}:1")
    _own_slot.cache_clear()
    progress(1, loss=0.5)
    assert page.read(0, 0) == []


def test_numbers_of_any_kind_are_metrics(page: MetricPage) -> None:
    """As libraries return them."""
    numpy = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    progress(numpy.int64(1), total=numpy.int32(5), array=numpy.float32(0.5), tensor=torch.tensor(0.25))
    (point,) = page.read(0, 0)
    assert (point.step, point.total, dict(point.values)) == (1, 5, {"array": 0.5, "tensor": 0.25})


@pytest.mark.parametrize("value", ["0.5", None, [1], object()])
def test_what_is_no_number_is_refused(value: Any) -> None:
    """By its name, also where nobody listens."""
    with pytest.raises(TypeError, match=r"(?s)loss=.*Fix: pass a number"):
        progress(1, loss=value)
    with pytest.raises(TypeError, match="as total"):
        progress(1, total=1.5)  # type: ignore[arg-type]


def test_there_is_a_bound_on_names(page: MetricPage, caplog: pytest.LogCaptureFixture) -> None:
    """What is too many is left out, and said once."""
    for step in range(2):
        progress(step, **{f"metric_{number}": float(number) for number in range(20)})
    points = page.read(0, 0)
    assert [len(point.values) for point in points] == [MOST_METRICS] * 2
    assert len(caplog.messages) == 1


def test_long_names_are_cut_and_stay_apart(page: MetricPage, caplog: pytest.LogCaptureFixture) -> None:
    """Each metric has its own values, whole characters only; said once."""
    begin = "validation/imagenet_v2_matched_frequency/top5/cl"
    names = [f"{begin}ass/accuracy", f"{begin}ass/loss", begin, "é" + "ü" * 40, "ü" * 40]
    for step in range(2):
        progress(step, **{name: float(number) for number, name in enumerate(names)})
    for point in page.read(0, 0):
        assert dict(point.values) == {begin: 0.0, f"{begin[:46]}~2": 1.0, f"{begin[:46]}~3": 2.0} | {
            "é" + "ü" * 23: 3.0,
            "ü" * 24: 4.0,
        }
    (message,) = caplog.messages
    assert f"{begin}ass/accuracy" in message


def test_names_of_three_bytes_a_character_are_cut_between_them(page: MetricPage) -> None:
    """Also where a number takes the place of a part of one."""
    progress(0, **{"x" + "損" * 20: 1.0, "x" + "損" * 30: 2.0})
    (point,) = page.read(0, 0)
    assert dict(point.values) == {"x" + "損" * 15: 1.0, "x" + "損" * 15 + "~2": 2.0}


def test_as_many_names_as_there_are_places_can_be_cut_to_the_same(page: MetricPage) -> None:
    """None is shown with another one's values."""
    progress(0, **{"x" * 50 + str(number): float(number) for number in range(MOST_METRICS)})
    (point,) = page.read(0, 0)
    assert [*point.values.values()] == [float(number) for number in range(MOST_METRICS)]


def test_a_ring_keeps_the_newest(page: MetricPage) -> None:
    """Of more calls than it holds; what is read is whole and in order."""
    for step in range(2000):
        progress(step, twice=2 * step)
    points = page.read(0, 0)
    assert [point.number for point in points] == list(range(2000 - len(points), 2000))
    assert len(points) > 400
    assert all(point.values["twice"] == 2 * point.step == 2 * point.number for point in points)


def test_a_round_begins_without_points(page: MetricPage) -> None:
    """Who asks for those of another round gets none."""
    progress(1, loss=0.5)
    page.start_round(1)
    assert page.read(0, 0) == page.read(1, 0) == []


def test_what_may_not_have_arrived_comes_again(page: MetricPage) -> None:
    """The end of a round overtakes a pulse; what a pulse has shown to be there does not come any more."""
    source = MetricsSource(page)
    assert source.next() == ()
    source.begin(0)
    progress(1)
    assert [point.step for point in source.next()] == [1]
    progress(2)
    assert [point.step for point in source.next()] == [2]
    progress(3)
    assert [point.step for point in source.end()] == [2, 3]
    assert source.end() == source.next() == ()


def test_an_answer_is_bounded(page: MetricPage) -> None:
    """Whatever was told since the last one; the newest is among it."""
    source = MetricsSource(page)
    source.begin(0)
    for step in range(500):
        progress(step)
    points = source.next()
    assert MOST_AT_A_TIME / 2 <= len(points) <= MOST_AT_A_TIME
    assert points[-1].step == 499


def points_of(count: int, round_index: int = 0) -> list[MetricPoint]:
    return [MetricPoint(round_index, number, number, float(number)) for number in range(count)]


@given(st.integers(0, 500), st.integers(1, 64))
def test_thinning_keeps_the_last(count: int, most: int) -> None:
    """Evenly, no more than asked for, and not much less."""
    kept = thinned(points_of(count), most)
    assert len(kept) <= most
    assert len(kept) >= min(count, most / 2)
    assert not count or kept[-1].number == count - 1


@given(st.integers(0, 400), st.integers(4, 20))
def test_a_history_is_bounded_and_even(count: int, most: int) -> None:
    """From the first point to the last; points that come twice are there once."""
    history = MetricHistory(most)
    points = points_of(count)
    for start in range(0, count, 7):
        history.add(points[max(0, start - 3) : start + 7])
    kept = [point.number for point in history.of_round(0)]
    assert len(kept) <= most
    assert kept == sorted(set(kept))
    if count:
        assert (kept[0], kept[-1]) == (0, count - 1)
        gaps = {after - before for before, after in itertools.pairwise(kept)}
        assert len(gaps) <= 2
    assert history.of_round(1) == ()


def test_rounds_have_curves_of_their_own() -> None:
    """Numbers begin again with each."""
    history = MetricHistory()
    assert len(history.add(points_of(3))) == 3
    assert history.add(points_of(3)) == []
    assert len(history.add(points_of(2, 1))) == 2
    assert (len(history.of_round(0)), len(history.of_round(1))) == (3, 2)
