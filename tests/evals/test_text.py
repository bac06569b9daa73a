import re

from hypothesis import given
from hypothesis import strategies as st

from evals.report import markdown, one_line, visible


def test_nothing_hides_or_reorders():
    assert visible("a\x1b[31mb") == "a␛[31mb"
    assert visible("txt\u202egpj") == "txt<U+202E>gpj"
    assert visible("a\u200bb\u2028c\ufeffd\U000e0041") == "a<U+200B>b<U+2028>c<U+FEFF>d<U+E0041>"
    assert visible("a\tb\nc é 漢 ✓") == "a\tb\nc é 漢 ✓"


def test_long_text_is_clipped_with_its_length():
    shown = visible("x" * 5_000_000, 4000)
    assert len(shown) < 4100 and "5,000,000 characters, 4,000 shown" in shown
    assert one_line("word " * 10_000, 50).endswith("…")
    assert one_line("a\n b\t c") == "a b c"


@given(st.text(max_size=80))
def test_visible_leaves_only_what_can_be_seen(text):
    assert not re.search(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff\ud800-\udfff]", visible(text)
    )


def test_markdown_is_inert():
    got = markdown("<img onerror=x> [a](javascript:1) | **b** `c` # d &lt;")
    assert "<" not in got.replace("\\<", "") and "\\[a\\]" in got and "\\|" in got and "\\*\\*" in got and "&amp;lt;" in got
