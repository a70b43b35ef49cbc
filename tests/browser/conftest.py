"""A browser for the tests of the explorer; none is fetched: what is installed is used, or nothing.

Tests here are marked `browser` and run by `nox -s browser`. They skip with a reason where there
is no Chromium or no selenium.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)


def start_chromium() -> Any:
    """A headless Chromium that keeps what its console and its network say."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("Chromium and chromedriver are not installed (chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,900"):
        options.add_argument(f"--{word}")
    for word in ("use-angle=swiftshader", "enable-unsafe-swiftshader"):  # WebGL2 in software
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # With its path said, selenium asks no server for a driver.
    service = webdriver.ChromeService(executable_path=driver)
    browser = webdriver.Chrome(options=options, service=service)
    browser.set_script_timeout(60)
    return browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """One Chromium for the tests of a module."""
    browser = start_chromium()
    yield browser
    browser.quit()


@pytest.fixture
def page(chromium: Any) -> Callable[[Path], Any]:
    """`page(path)`: the browser with that file open and its explorer ready."""

    def opened(path: Path) -> Any:
        chromium.get(path.resolve().as_uri())
        chromium.execute_async_script(
            "const done = arguments[0]; window.vistvis.ready.then(done, done)"
        )
        return chromium

    return opened
