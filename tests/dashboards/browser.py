"""A headless Chromium that opens pages by file://, and fails a test whose page says an error or asks for more."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium to open pages in: apt-get install chromium"
)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser. Root needs no sandbox, which Chromium refuses to give it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.getuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*options, "--disable-gpu"])
        yield browser
        browser.close()


class Opened:
    """A page, and what it said and asked for."""

    def __init__(self, browser: Any, file: Path, address: str = "", **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1440, "height": 900}} | context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(8000)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.go(file, address)

    def go(self, file: Path, address: str = "") -> None:
        self.page.goto(f"{file.resolve().as_uri()}{address}")
        self.page.wait_for_selector("#page > *", state="attached")

    def text(self, selector: str) -> str:
        return str(self.page.locator(selector).first.inner_text())

    def texts(self, selector: str) -> list[str]:
        return [str(text) for text in self.page.locator(selector).all_inner_texts()]

    def scripts(self) -> list[str]:
        """Data that were asked for, in order."""
        return [url.rsplit("/", 1)[1] for url in self.asked if "/data/" in url]
