"""A real browser for tests of HTML pages: the system's Chromium without network access."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

from tests.limits import STEP_SECONDS

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed")

_OPTIONS = (
    # Containers have no use for Chromium's own sandbox, updates and reports.
    "--no-sandbox --headless --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)


def _launch_options(*options: str) -> dict[str, Any]:
    return {"executable_path": BROWSER, "args": [*_OPTIONS.split(), *options], "timeout": 1000 * STEP_SECONDS}


@contextmanager
def start_browser() -> Iterator[Browser]:
    """Start the browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**_launch_options())
        yield browser
        browser.close()


@contextmanager
def start_profile(folder: Path, *options: str) -> Iterator[BrowserContext]:
    """Start the browser with a profile on disk, and with further options of its command line.

    Unlike the contexts of `start_browser`, the profile keeps compiled scripts: a Gradio page loads twice as fast.
    """
    with sync_playwright() as playwright:
        profile = playwright.chromium.launch_persistent_context(folder, **_launch_options(*options))
        profile.set_default_timeout(1000 * STEP_SECONDS)
        yield profile
        profile.close()


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
