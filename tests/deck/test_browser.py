"""The page as a person sees it: in a browser, wide and narrow, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sample_reports
from flytekit.deck.deck import get_deck_template
from typing_extensions import Self

from kfpytorch_ray.report.data import RunReport
from kfpytorch_ray.report.page import fragment, page

REPORTS = {
    "success": sample_reports.success(gpus=True),
    "failure": sample_reports.failure(),
    "64 ranks": sample_reports.success(8, 8, count=120),
}
SECTIONS = ("summary", "time", "timeline", "ranks", "metrics", "resources", "nodes", "logs", "versions")


class Seen:
    """A page in the browser, and everything that it asked for or complained about."""

    def __init__(self, browser: Any, html: str, folder: Path, *, width: int = 1280, dark: bool = False) -> None:
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.tab = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        file = folder / f"{width}-{scheme}.html"
        file.write_text(html, encoding="utf-8")
        self.file = file.as_uri()
        self.tab.goto(self.file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 480])
@pytest.mark.parametrize("name", REPORTS)
def test_a_person_can_read_it(chromium: Any, name: str, width: int, dark: bool, tmp_path: Path) -> None:
    """No error, no request, every section visible and none wider than the window; a screenshot is left."""
    report: RunReport = REPORTS[name]
    with Seen(chromium, page(report), tmp_path, width=width, dark=dark) as seen:
        tab = seen.tab
        sections = (*SECTIONS, *(("cause", "rounds") if report.failure else ()))
        for section in sections:
            box = tab.locator(f"#{section}").bounding_box()
            assert box is not None, section
            assert box["height"] > 30, section
            assert box["x"] >= 0, section
            assert box["x"] + box["width"] <= width, section
        for section, curves in (("metrics", 1), ("resources", 2 * len(report.samples))):
            lines = [line.bounding_box() for line in tab.locator(f"#{section} polyline").all()]
            assert len(lines) >= curves, section
            assert all(line["width"] > 20 for line in lines), section
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        background = tab.evaluate("getComputedStyle(document.querySelector('.kfr')).backgroundColor")
        lightness = sum(map(int, background.removeprefix("rgb(").removesuffix(")").split(",")))
        assert (lightness < 200) is dark
        assert _too_faint(tab) == []
        picture = tmp_path / "page.png"
        tab.screenshot(path=picture, full_page=True)
        assert picture.stat().st_size > 10_000
        assert seen.requests == [seen.file]
        assert seen.complaints == []


def test_the_cause_is_in_the_first_screenful(chromium: Any, tmp_path: Path) -> None:
    """What failed, why, what to do and where in the code are seen without scrolling."""
    with Seen(chromium, page(sample_reports.failure()), tmp_path) as seen:
        for words in (f"Rank 3 raised {sample_reports.MESSAGE}", "Correct what the message names", "in criterion"):
            box = seen.tab.get_by_text(words).first.bounding_box()
            assert box["y"] + 20 < 900, words


def test_ranks_lie_on_the_timeline_where_their_times_are(chromium: Any, tmp_path: Path) -> None:
    """The bars of rank 0, in pixels, divide its lane as its times divide the run."""
    report = sample_reports.success()
    with Seen(chromium, page(report), tmp_path) as seen:
        lane = seen.tab.locator("#timeline .lane.thin").first
        whole = lane.locator("svg").bounding_box()
        bars = [bar.bounding_box() for bar in lane.locator("rect").all()]
        rank = report.rounds[0].ranks[0]
        seconds = report.ended_at - report.started_at
        for bar, began, ended in zip(
            bars, (rank.started_at, rank.called_at), (rank.called_at, rank.ended_at), strict=True
        ):
            assert bar["x"] - whole["x"] == pytest.approx(whole["width"] * (began - report.started_at) / seconds, abs=2)
            assert bar["width"] == pytest.approx(whole["width"] * (ended - began) / seconds, abs=2)


def test_it_leaves_other_decks_of_a_flyte_page_alone(chromium: Any, tmp_path: Path) -> None:
    """Within flytekit's own page it is shown as one of several decks, and the others look as they would without it."""
    other = "<p class='label'>drawn by the user</p><table><tr><td>1</td></tr></table>"
    looks = []
    for own in ("", fragment(sample_reports.failure())):
        body = f"<div>{other}</div><div>{own}</div>"
        html = get_deck_template().substitute(NAV_HTML="<li>user's</li><li>Elastic run</li>", BODY_HTML=body)
        # It links a font from the network, which is no business of ours.
        html = html.replace("https://fonts.googleapis.com", "data:text/css,")
        with Seen(chromium, html, tmp_path) as seen:
            looks.append(
                [
                    seen.tab.evaluate(f"JSON.stringify({{...getComputedStyle(document.querySelector('{what}'))}})")
                    for what in ("#flyte-frame-container p", "#flyte-frame-container td", "#flyte-frame-tabs li")
                ]
            )
            assert not seen.tab.locator(".kfr").is_visible() if own else True
    assert looks[0] == looks[1]


def _too_faint(tab: Any) -> list[str]:
    """Texts whose contrast with what is behind them is below 4.5 to 1, as WCAG measures it; large ones below 3."""
    found: list[str] = tab.evaluate(
        """() => {
        const rgb = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
        const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const behind = node => {
            for (let at = node; at; at = at.parentElement) {
                const colour = rgb(getComputedStyle(at).backgroundColor);
                if (colour.length === 3 || colour[3] === 1) return colour;
            }
            return [255, 255, 255];
        };
        const faint = [];
        for (const node of document.querySelectorAll('.kfr *')) {
            if (node.closest('svg') || node.matches('style') || !node.checkVisibility()) continue;
            const said = [...node.childNodes].filter(one => one.nodeType === 3 && one.data.trim());
            if (!said.length) continue;
            const style = getComputedStyle(node);
            if (style.visibility === 'hidden') continue;
            const [a, b] = [light(rgb(style.color)), light(behind(node))].sort((x, y) => y - x);
            const ratio = (a + 0.05) / (b + 0.05);
            if (ratio < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5))
                faint.push(`${said[0].data.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
        }
        return [...new Set(faint)];
    }"""
    )
    return found
