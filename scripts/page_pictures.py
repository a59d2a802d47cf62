"""Draws figures of a page as PNG files, with headless Chromium: `page.html docs regret kept_surrogate`."""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

WIDTH, HEIGHT = 1440, 1000  # of the window, in pixels


def browser_is_installed() -> bool:
    return bool(shutil.which("chromium") and shutil.which("chromedriver"))


def headless_chromium(profile: Path) -> Chrome:
    """Starts a browser that keeps what pages say and ask for; leave its context to end it.

    Args:
        profile: An empty folder.
    """
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.add_argument(f"--window-size={WIDTH},{HEIGHT}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses to run as root with it
    return Chrome(options=options, service=Service(shutil.which("chromedriver")))


def draw(page: Path, folder: Path, names: Sequence[str]) -> list[Path]:
    """Writes `folder/NAME.png` for figures of a page."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [folder / f"{name}.png" for name in names]
    with tempfile.TemporaryDirectory() as profile, headless_chromium(Path(profile)) as browser:
        browser.get(page.resolve().as_uri())
        browser.set_window_size(WIDTH, HEIGHT + browser.execute_script("return document.body.scrollHeight"))
        for name, path in zip(names, drawn, strict=True):
            path.write_bytes(browser.find_element("id", f"figure-{name}").screenshot_as_png)
    return drawn


if __name__ == "__main__":
    if len(sys.argv) < 4 or not browser_is_installed():
        sys.exit("usage: python -m scripts.page_pictures PAGE.html FOLDER FIGURE...; needs chromium and chromedriver")
    print("\n".join(map(str, draw(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))))
