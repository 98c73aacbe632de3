import time

import pytest

from silotune.data.formats.html_text import plain_text_of, unescaped


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>one</p><p>two <i>three</i></p>", "one\ntwo three"),
        ("a<br/>b", "a\nb"),
        ("a <!-- not <p> shown --> b", "a b"),
        ("<!DOCTYPE html><head><title>t</title></head>x<script>if (a<b) {}</script>y", "xy"),
        ('<a title="1 > 2">x</a> &lt;5 &eacute;&nbsp;&#233;', "x <5 é é"),
        ("BP <120 and 3 < 4", "BP <120 and 3 < 4"),
        ("<td>1</td><td>2</td>", "1\n2"),
        ("", ""),
    ],
)
def test_html_is_shown_as_a_browser_does(html, text):
    assert plain_text_of(html) == text


@pytest.mark.parametrize(
    "part", ["<a ", "<!--", "<a href='", '<a x="y', "</", "<script>", "<![CDATA[", "&#", "<", "<p>"]
)
def test_time_grows_as_the_length_whatever_stands_in_it(part):
    """The standard library's parser takes minutes for these."""
    html = part * (200_000 // len(part))
    begun = time.process_time()
    plain_text_of(html)
    assert time.process_time() - begun < 2


def test_a_reference_of_too_many_digits_stays_as_it_is():
    text = f"&#{'9' * 5000};"
    assert unescaped(text) == text
