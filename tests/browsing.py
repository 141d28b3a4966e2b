"""Open a page in a real browser, and record its console output and its requests."""

HOSTILE = (
    "</pre></script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"> & \x1b[2J"
)


def opened(browser, file, width=360, scheme="light"):
    """Open a file. Returns (the page, its console output, its requests)."""
    page = browser.new_page(viewport={"width": width, "height": 740}, color_scheme=scheme)
    console, requests = [], []
    page.on("console", lambda message: console.append(message.text))
    page.on("pageerror", lambda error: console.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(file.as_uri())
    return page, console, requests
