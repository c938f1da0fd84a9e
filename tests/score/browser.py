"""A real browser for tests of HTML pages: the system's Chromium without network access."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")

STEP_SECONDS = 180  # on a busy machine a step can take a minute; a healthy one never waits

_OPTIONS = (
    # Containers have no use for Chromium's own sandbox, updates and reports.
    "--no-sandbox --headless --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


@contextmanager
def start_browser(*options: str) -> Iterator[Browser]:
    """Start the browser, with further options of its command line."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=[*_OPTIONS.split(), *options], timeout=1000 * STEP_SECONDS
        )
        yield browser
        browser.close()


class MonitoredPage:
    """A page opened from its file, with a log of its requests and errors.

    Args:
        page: the page.
        requested: URLs of all its requests; all but files and embedded data were blocked.
        errors: messages of the browser's console.
    """

    def __init__(self, page: Page) -> None:
        page.set_default_timeout(1000 * STEP_SECONDS)
        self.page = page
        self.requested: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requested.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: self.errors.append(message.text))
        page.route(lambda url: not url.startswith(("file:", "data:")), lambda route: route.abort())

    def width(self) -> int:
        """Return the width of the scrollable area, in pixels."""
        return self.page.evaluate("document.documentElement.scrollWidth")
