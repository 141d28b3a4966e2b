"""Take the screenshots for the documentation: `python docs/screenshot.py PAGE`, with one of these pages:

Report (out/report.html, after `python train.py`): docs/report.png and, in dark colours, docs/report-dark.png. They show
the loss, and below it the first, middle and last sample, from left to right.
Inspector (after `python -m gpt2.inspect -p "Return the list of lines"`): docs/inspect.png shows the surprise of each
token, what was expected, and the attention of one head. The rest of the page is hidden.
gpt2.serve (the URL, while `python -m gpt2.serve` is running): docs/serve.png shows a text with the alternatives of a
token, and the inspector next to it.
Requires the extra [browser] and Chromium (the system's, or from `playwright install chromium`).
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ARRANGE_REPORT = """() => {
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

ARRANGE_INSPECTOR = """() => {
    const [tokens, attention] = document.querySelectorAll('.inspector section')
    document.querySelector('[aria-label^="layer 4, head 6"]').click()
    for (const hidden of document.querySelectorAll('.hint, h2, section > p, details, .readout')) hidden.remove()
    document.querySelector('.inspector').replaceChildren(tokens, attention)
    document.querySelector('main').replaceChildren(document.querySelector('.inspector'))
    tokens.style.marginTop = '0'
    attention.style.marginTop = '20px'
    document.querySelector('main').style.padding = '16px'
}"""


def play(page: Page) -> None:
    """Generate a text, and select one of its tokens."""
    page.get_by_label("Prompt").fill("Return the list of")
    page.get_by_label("Length").fill("120")
    page.get_by_role("button", name="Generate").click()
    page.wait_for_selector(".inspector", timeout=120_000)
    page.wait_for_selector('[data-play="waiting"]', state="hidden")
    page.locator(".piece").nth(5).click()
    page.evaluate("document.querySelector('[data-play=count]').remove()")  # it shows the speed of this machine
    page.evaluate("document.querySelector('.play').scrollTop = 0")
    page.mouse.move(0, 0)  # no token is highlighted
    page.wait_for_timeout(500)  # the inspector fades in


def main(file: str) -> None:
    with sync_playwright() as playwright:
        installed = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        if file.startswith("http://"):
            page = browser.new_page(viewport={"width": 1400, "height": 960})
            page.goto(file)
            play(page)
            page.screenshot(path=Path(__file__).parent / "serve.png")
            return
        inspector = 'class="inspector"' in Path(file).read_text(encoding="utf-8")
        pictures = [("light", "report.png"), ("dark", "report-dark.png")]
        for scheme, name in [("light", "inspect.png")] if inspector else pictures:
            page = browser.new_page(viewport={"width": 1040, "height": 400}, color_scheme=scheme)
            page.goto(Path(file).resolve().as_uri())
            page.evaluate(ARRANGE_INSPECTOR if inspector else ARRANGE_REPORT)
            page.locator("main").screenshot(path=Path(__file__).parent / name)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
