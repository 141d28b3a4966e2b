"""Takes the README's picture: `python docs/screenshot.py out/report.html`, after `python train.py`.

Writes docs/report.png and, in the page's dark colours, docs/report-dark.png: the loss, and below it the first, a middle
and the last sample, from left to right; the rest of the page is hidden. Needs the extra [browser] and a Chromium: the
system's, or `playwright install chromium`.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

ARRANGE = """() => {
    const loss = document.querySelector('figure.linear')
    const shown = [...document.querySelectorAll('section')].find(s => s.querySelector('h2').textContent == 'Samples')
    const samples = [...shown.lastElementChild.children].reverse()
    const chosen = [samples[0], samples[(samples.length - 1) >> 1], samples.at(-1)]
    shown.lastElementChild.replaceChildren(...chosen)
    shown.querySelector('h2').remove()
    shown.style.marginTop = '20px'
    loss.querySelector('details').remove()
    document.querySelector('main').replaceChildren(loss, shown)
    document.querySelector('main').style.padding = '16px'
}"""


def main(report: str) -> None:
    with sync_playwright() as playwright:
        installed = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        for scheme, name in (("light", "report.png"), ("dark", "report-dark.png")):
            page = browser.new_page(viewport={"width": 1040, "height": 400}, color_scheme=scheme)
            page.goto(Path(report).resolve().as_uri())
            page.evaluate(ARRANGE)
            page.locator("main").screenshot(path=Path(__file__).parent / name)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
