"""Takes the pictures of the documents: `python docs/screenshot.py PAGE`, for a page of gpt2.report or of gpt2.inspect.

The report, out/report.html after `python train.py`: docs/report.png and, in the page's dark colours,
docs/report-dark.png. They show the loss, and below it the first, a middle and the last sample, from left to right.
The inspector, after `python -m gpt2.inspect -p "Return the list of lines"`: docs/inspect.png shows the surprise of the
tokens, what was expected, and the attention of a head. The rest of a page is hidden. Needs the extra [browser] and a
Chromium: the system's, or `playwright install chromium`.
"""

import base64
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, sync_playwright

COLOURS = 200  # of a picture: a third of the bytes of a picture with all colours

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
    document.querySelector('[aria-label^="layer 2, head 4"]').click()
    for (const hidden of document.querySelectorAll('.hint, h2, section > p, details, .readout')) hidden.remove()
    document.querySelector('.inspector').replaceChildren(tokens, attention)
    document.querySelector('main').replaceChildren(document.querySelector('.inspector'))
    tokens.style.marginTop = '0'
    attention.style.marginTop = '20px'
    document.querySelector('main').style.padding = '16px'
}"""


READ = """async (url) => {
    const image = await createImageBitmap(await (await fetch(url)).blob())
    const context = new OffscreenCanvas(image.width, image.height).getContext('2d')
    context.drawImage(image, 0, 0)
    const bytes = context.getImageData(0, 0, image.width, image.height).data
    let text = ''
    for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192))
    return [image.width, image.height, btoa(text)]
}"""


def with_palette(browser: Browser, png: bytes) -> bytes:
    """A PNG with at most COLOURS colours: each further one is that of the pixels which the others represent worst."""
    page = browser.new_page()
    width, height, data = page.evaluate(READ, f"data:image/png;base64,{base64.b64encode(png).decode()}")
    page.close()
    pixels = np.frombuffer(base64.b64decode(data), np.uint8).reshape(-1, 4)[:, :3].astype(np.int32)
    _, which, counts = np.unique(pixels >> 3, axis=0, return_inverse=True, return_counts=True)
    which = which.reshape(-1)
    means = np.stack([np.bincount(which, pixels[:, i]) for i in range(3)], axis=1) / counts[:, None]
    palette = means[[counts.argmax()]]
    while len(palette) < min(COLOURS, len(means)):
        error = counts * ((means[:, None] - palette) ** 2).sum(axis=2).min(axis=1)
        palette = np.concatenate((palette, means[[error.argmax()]]))
    nearest = np.array([((palette - mean) ** 2).sum(axis=1).argmin() for mean in means], dtype=np.uint8)
    rows = np.concatenate((np.zeros((height, 1), np.uint8), nearest[which].reshape(height, width)), axis=1)

    def chunk(kind: bytes, contents: bytes) -> bytes:
        return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))

    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = (
        (b"IHDR", header),
        (b"PLTE", np.rint(palette).astype(np.uint8).tobytes()),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def main(file: str) -> None:
    with sync_playwright() as playwright:
        installed = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=installed, args=["--no-sandbox"])
        inspector = 'class="inspector"' in Path(file).read_text(encoding="utf-8")
        pictures = [("light", "report.png"), ("dark", "report-dark.png")]
        for scheme, name in [("light", "inspect.png")] if inspector else pictures:
            page = browser.new_page(viewport={"width": 1040, "height": 400}, color_scheme=scheme)
            page.goto(Path(file).resolve().as_uri())
            page.evaluate(ARRANGE_INSPECTOR if inspector else ARRANGE_REPORT)
            picture = with_palette(browser, page.locator("main").screenshot())
            (Path(__file__).parent / name).write_bytes(picture)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
