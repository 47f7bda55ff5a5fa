"""A real browser without a screen: Debian's Chromium, installed with apt-get where it is missing; or why not."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PACKAGES = "chromium fonts-dejavu-core"


class Unavailable(RuntimeError):
    """A browser that cannot be had here; the message says why."""


def find_browser() -> str:
    """The path of a browser. Raises Unavailable. Two test processes do not install at the same time."""
    with Path(tempfile.gettempdir(), f"iccld_browser_install_{os.getuid()}").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := _found():
            return found
        if os.geteuid() != 0 or not shutil.which("apt-get"):
            raise Unavailable(f"no {', '.join(NAMES)} found, and only root can do: apt-get install {PACKAGES}")
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        install = f"apt-get update -q && apt-get install -q -y --no-install-recommends {PACKAGES}"
        done = subprocess.run(["sh", "-c", install], check=False, timeout=300, env=environment, capture_output=True)
        if found := _found():
            return found
        raise Unavailable(f"apt-get could not install {PACKAGES}: {done.stderr.decode()[-300:]}")


@contextmanager
def started() -> Iterator[Any]:
    """A browser as playwright's `Browser`. Raises Unavailable where there is none, or no playwright."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise Unavailable(f"playwright is not installed ({error}): pip install playwright") from error
    path = find_browser()
    options = ["--no-sandbox"] if os.geteuid() == 0 else []  # which root needs; the pages are the tests' own
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=options)
        try:
            yield browser
        finally:
            browser.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser for a module's tests, which are skipped without one."""
    try:
        with started() as browser:
            yield browser
    except Unavailable as why:
        pytest.skip(str(why))


@contextmanager
def whole_page(browser: Any, path: Path, photograph: Path, *, width: int, scheme: str = "light") -> Iterator[Any]:
    """Open and photograph a file; it fetches nothing, complains of nothing, and nothing of it is cut off."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.screenshot(path=str(photograph), full_page=True)
    assert not said
    assert [url for url in asked if not url.startswith("data:image/")] == [path.as_uri()]
    assert page.locator("img").evaluate_all("images => images.every(i => i.complete && i.naturalWidth > 0)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off"
    yield page
    context.close()


def _found() -> str:
    return next((path for name in NAMES if (path := shutil.which(name))), "")
