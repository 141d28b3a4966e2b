"""Fixtures for the tests of HTML pages."""

import shutil

import pytest


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: the system's, or the one that Playwright installed."""
    from playwright import sync_api as api

    names = ("chromium", "chromium-browser", "google-chrome")
    installed = next((path for name in names if (path := shutil.which(name))), None)
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"requires Chromium; try `playwright install chromium`: {str(error).splitlines()[0]}")
        yield browser
        browser.close()
