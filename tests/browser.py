"""A headless Chromium without network, for the tests of pages and for their pictures."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
INSTALL = "needs Chromium: apt-get install --no-install-recommends chromium (as .ci/run does)"
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def complains(said: ConsoleMessage) -> bool:
    """Whether a message is an error or a warning, but for one that reading pixels gives."""
    return said.type in ("error", "warning") and "willReadFrequently" not in said.text


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, for any number of tabs."""
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, html: Path, height: int = 900) -> Iterator[Page]:
    """A tab on a file, with a profile of its own; what the page asks for is in `page.asked`."""
    with browser.new_context(viewport={"width": 1440, "height": height}) as profile:
        page = profile.new_page()
        asked: list[str] = []
        complaints: list[str] = []
        page.asked, page.complaints = asked, complaints  # type: ignore[attr-defined]
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if complains(said) else None)
        page.goto(html.resolve().as_uri())
        page.wait_for_function("document.documentElement.dataset.drawn")
        yield page
