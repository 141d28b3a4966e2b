"""gpt2/page.py: HTML pages in one file, with their content security policy and data."""

import base64
import hashlib
import json
import re

import pytest

from gpt2 import page
from tests.browsing import HOSTILE, opened


def test_the_policy_contains_the_hashes_of_style_and_script():
    text = page.page("<title>", "<p>body</p>", ".own { color: red }", "let own;", {"a": 1})
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    style, script = re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1], "let own;"
    assert style == page.resource("page.css") + ".own { color: red }"
    for kind, contents in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(contents.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    assert "<title>&lt;title&gt;</title>" in text
    assert f"<script>{script}</script></body></html>\n" in text


def test_data_cannot_end_its_element():
    data = {"text": HOSTILE, "<!--": "</SCRIPT><!-- é \u2028 \ud800"}
    block = page.data_block(data)
    inside = re.fullmatch(r'<script type="application/json" id="data">(.*)</script>', block)[1]
    assert "<" not in inside
    assert json.loads(inside) == data
    assert 'id="data"' not in page.page("", "", "", "")


def test_numbers_that_json_does_not_support_are_rejected():
    with pytest.raises(ValueError, match="JSON compliant"):
        page.data_block({"x": float("nan")})


@pytest.mark.extras("playwright")
def test_the_script_reads_the_data_and_no_other_script_runs(browser, tmp_path):
    script = "document.title = JSON.parse(document.getElementById('data').textContent).text.length"
    body = '<p id="here">text</p><script>document.title = "taken"</script><img src="http://127.0.0.1:9/">'
    page.write(page.page("", body, "#here { width: 123px }", script, {"text": HOSTILE}), tmp_path / "page.html")
    shown, said, _ = opened(browser, tmp_path / "page.html")
    assert shown.title() == str(len(HOSTILE))
    assert shown.evaluate("getComputedStyle(document.getElementById('here')).width") == "123px"
    assert len([line for line in said if "Content Security Policy" in line]) == len(said) == 2


def test_only_a_live_page_may_send_requests_and_only_to_its_server():
    still, live = page.page("t", "", "", ""), page.page("t", "", "", "", live=True)
    assert "connect-src" not in still
    assert "connect-src 'self'; form-action 'none'; base-uri 'none'\">" in live
    assert "It loads nothing from the network" in still
    assert "Served by tinygrad2 on this machine" in live


def test_a_page_reloads_itself_if_requested():
    assert "refresh" not in page.page("t", "", "", "")
    assert '<meta http-equiv="refresh" content="7">' in page.page("t", "", "", "", refresh=7)
