"""A page in a real browser: what it said and what it asked for."""

HOSTILE = (
    "</pre></script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"> & \x1b[2J"
)


def opened(browser, file, width=360, scheme="light"):
    """(the page, what its console said, what it asked for)."""
    page = browser.new_page(viewport={"width": width, "height": 740}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    return page, said, asked
