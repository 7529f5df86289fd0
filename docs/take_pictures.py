"""The pictures of the README, from two real launches: a terminal while they run, and the run decks that they leave.

    python docs/take_pictures.py        needs Chromium, and what the extra "dev" installs

Runs examples/run_deck.py under a pseudo-terminal, whose screen a terminal emulator keeps.
"""

from __future__ import annotations

import html
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from fcntl import ioctl
from pathlib import Path

import pyte
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
LINES, COLUMNS = 20, 100
WIDTH = 1000
SHOWN = re.compile(r"round 2.*\b(3|4)\d/60", re.DOTALL)
"""The screen that is wanted: training has gone on after the first launch's failure, and is in its second half."""
ENDS = {"recovered": ("run-deck", "resources"), "failed": ("run-deck-failed", "timeline")}
"""By the page's name: the picture's, and the last section that is on it."""
COLOURS = {"default": "#d4d4d4", "brown": "#d7ba7d", "green": "#6a9955", "red": "#f44747", "cyan": "#4ec9b0"}


def watch(folder: Path) -> str:
    """Run the example in a folder, and return the wanted screen as HTML."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    person, terminal = pty.openpty()
    ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    # Tracebacks on the pictures show where it lies.
    shutil.copy(ROOT / "examples" / "run_deck.py", folder)
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "run_deck.py"],
        cwd=folder,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    wanted = ""
    # The other end is closed when the example has ended, and reading fails then.
    while chunk := _read(person):
        stream.feed(chunk)
        if not wanted and SHOWN.search("\n".join(screen.display)):
            wanted = drawn(screen)
    os.close(person)
    if process.wait() or not wanted:
        sys.exit("\n".join(screen.display))
    return wanted


def _read(person: int) -> bytes:
    try:
        return os.read(person, 4096)
    except OSError:
        return b""


def drawn(screen: pyte.Screen) -> str:
    """A screen as a page."""
    lines = []
    for number in range(screen.lines):
        cells = [screen.buffer[number][column] for column in range(screen.columns)]
        lines.append("".join(f'<span style="{_style(cell)}">{html.escape(cell.data)}</span>' for cell in cells))
    while lines and not re.sub(r"<[^>]*>", "", lines[-1]).strip():
        lines.pop()
    text = "\n".join(lines)
    return (
        '<meta charset="utf-8"><body style="margin:0;background:#1e1e1e">'
        f'<pre style="margin:0;padding:14px;font:14px/1.4 monospace;display:inline-block">{text}</pre>'
    )


def _style(cell: pyte.screens.Char) -> str:
    colour = COLOURS.get(cell.fg, f"#{cell.fg}" if re.fullmatch("[0-9a-f]{6}", cell.fg) else cell.fg)
    return f"color:{colour}" + (";font-weight:bold" if cell.bold else "")


def photograph(tab: Page, page: Path, picture: str, last: str) -> None:
    """A page from its top to the end of an element."""
    tab.goto(page.as_uri())
    end = tab.locator(last).bounding_box()
    assert end is not None
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": end["y"] + end["height"]}
    tab.screenshot(path=IMAGES / f"{picture}.png", full_page=True, clip=clip)


def main() -> None:
    """Run, and take all pictures."""
    with tempfile.TemporaryDirectory(prefix="digits-") as name, sync_playwright() as playwright:
        folder = Path(name)
        (folder / "terminal.html").write_text(watch(folder))
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": 900})
        photograph(tab, folder / "terminal.html", "terminal", "pre")
        for page, (picture, last) in ENDS.items():
            photograph(tab, folder / f"{page}.html", picture, f"#{last}")
        browser.close()


if __name__ == "__main__":
    main()
