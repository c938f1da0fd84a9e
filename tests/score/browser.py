"""A real browser for tests of pages: the system's Chromium, cut off from the network."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")

STEP_SECONDS = 180  # on a busy machine a step can take a minute; a healthy one never waits

_OPTIONS = (
    # Containers do without Chromium's own sandbox, and without the updates and reports that it sends by itself.
    "--no-sandbox --headless --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@contextmanager
def start_browser() -> Iterator[Browser]:
    """A running browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=_OPTIONS.split(), timeout=1000 * STEP_SECONDS
        )
        yield browser
        browser.close()


class Watched:
    """A page that is opened from its file, and what went on there.

    Args:
        page: the page.
        asked: all addresses that it asked for; those that are neither a file nor inside the page were refused.
        complaints: errors and warnings of the browser's console.
    """

    def __init__(self, page: Page) -> None:
        page.set_default_timeout(1000 * STEP_SECONDS)
        self.page = page
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", lambda message: self.complaints.append(message.text))
        page.route(lambda url: not url.startswith(("file:", "data:")), lambda route: route.abort())

    def width(self) -> int:
        """Of all that can be scrolled to, in pixels."""
        return self.page.evaluate("document.documentElement.scrollWidth")
