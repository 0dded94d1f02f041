"""HTML: everything that a browser shows is read, what it does not show is not."""

from __future__ import annotations

import pytest

from lloco_engine.errors import DocumentError
from lloco_engine.readers.html import text_of_html


def text(page: str) -> str:
    return text_of_html(page, 1000)[1]


@pytest.mark.parametrize(
    ("page", "shown"),
    [
        (
            "<math><mfrac><mrow><mi>a</mi><mo>+</mo><mi>b</mi></mrow><msqrt><mi>c</mi></msqrt></mfrac></math>",
            "(a+b)/√(c)",
        ),
        ("<math><msubsup><mi>x</mi><mn>1</mn><mn>2</mn></msubsup></math>", "x_1^2"),
        ("<math><semantics><mi>E</mi><annotation encoding='application/x-tex'>F</annotation></semantics></math>", "E"),
        ("<p>so <script type='math/tex'>x^2</script> is", "so $x^2$ is"),
        ("<img class='mwe-math-fallback-image' alt='E=mc^2'><img alt='a cat'>", "E=mc^2"),
        ("weighs 10<sup>6</sup> kg a m<sup>2</sup>", "weighs 10^6 kg a m2"),
        ("<ol start=3><li>a<li>b</ol><ul><li>c</ul>", "3. a\n4. b\n\nc"),
        ("<ol style='list-style:none'><li>a</ol>", "a"),
        ("<svg><title>icon</title><text>3,150</text></svg>rpm", "3,150\n\nrpm"),
        ("<p>a<iframe src=x>b<p>c", "ab\n\nc"),
        ("<title>T<p>a", "a"),
        ("a<noscript>b<p>c", "ab\n\nc"),
        ("a<noscript>b</noscript>", "a"),
        ("<noscript>only</noscript>", "only"),
        ("<details><summary>s</summary>on a click</details>", "s\n\non a click"),
        ("<p hidden>no<p>a", "a"),
        ("<p style='dis\\70lay:none'>no<p>a", "a"),
        ("<p style='visibility:hidden'>no<b style='visibility:visible'>a</b>", "a"),
        ("<style>.x{display:none}.x.y{display:block}</style><p class=x>no<p class='x y'>a", "a"),
        ("<style>@media print{p{display:none}}</style><p>a", "a"),
        ("<style>p:hover{display:none}</style><p>a", "a"),
        ("<style>p{color:white}</style><p>no<div>a", "a"),
        ("<link rel=stylesheet href=dark.css><p style='color:white'>a", "a"),
        ("<body style='background:#000;color:#fff'>a<b style='color:black'>no</b>", "a"),
        ("<p style='font-size:0'>no<span style='font-size:12px'>a</span>", "a"),
        ("<p style='text-indent:-9999px'>no</p>a", "a"),
        ("<select><option>a<option>b</select>c", "a\nb\nc"),
        ("<input type=hidden value=no><input value=a>", "a"),
        ("<p aria-hidden=true>a", "a"),
        ("<ol reversed><li>a<li>b</ol>", "2. a\n1. b"),
        ("<ol type=I start=4><li>x<li value=9>y</ol>", "IV. x\nIX. y"),
        ("<style>ol{list-style:lower-alpha inside}</style><ol start=27><li>x</ol>", "aa. x"),
        ("<style>li{list-style:none}</style><ol><li>x</ol>", "x"),
        ("<ruby>漢<rp>(</rp><rt>かん</rt>字<rt>じ</rt></ruby>です", "漢字(かんじ)です"),
        ("He said <q>stop</q>.", "He said “stop”."),
        ("<svg><text display=none>no</text><g visibility=hidden><text>no</text></g><text>a</text></svg>", "a"),
        ("<div display=none>a</div>", "a"),
        ("<math><mi>x</mi><mphantom><mi>y</mi></mphantom></math>", "x"),
        (
            "<math><mmultiscripts><mi>C</mi><mn>6</mn><none/><mprescripts/><none/><mn>12</mn></mmultiscripts></math>",
            "C_6^12",
        ),
        ("<div popover>no</div>a", "a"),
        ("<input placeholder=Name>", "Name"),
        (
            "<x-a><template shadowrootmode=open><style>b{color:#fff}</style>in<slot></slot></template><b>a</b></x-a>",
            "in\n\na",
        ),
        ("<template><p>no</template>a", "a"),
        ("<style media=print>p{display:none}</style><p>a", "a"),
        ("<style>@layer u{.h{display:none}}</style><p class=h>no<p>a", "a"),
        ("<style>.h{display:block}@layer u{.h{display:none}}</style><p class=h>a", "a"),
        ("<style>@supports (display:grid){.h{display:none}}</style><p class=h>no<p>a", "a"),
        ("<style>.c{color:red;.h{display:none}&.k{display:none}}</style><i class=c><b class=h>no</b></i>a", "a"),
        ("<style>.c{&.k{display:none}}</style><p class='c k'>no<p class=k>a", "a"),
        ("<p style='font:0/0 x'>no</p>a", "a"),
        ("<pre>" + " " * 5 + "a\n  b</pre>", "a\n  b"),
    ],
)
def test_what_is_shown_is_read(page, shown):
    assert text(page).strip() == shown


def test_a_title_is_not_an_icons():
    assert text_of_html("<svg><title>icon</title></svg><h1>Head <i>line</i></h1>a", 100)[0] == "Head line"


def test_nesting_has_a_limit_that_is_stated():
    assert text("<div>" * 900 + "a").strip() == "a"
    with pytest.raises(DocumentError, match=r"at most 1,000 tags open at once.*max_nesting"):
        text("<div>" * 1001 + "a")
    assert text("<p>a" * 5000).count("a") == 5000  # a paragraph ends the one before


def test_work_grows_with_length_alone():
    """Times of one run are compared, as no machine's own can be known."""
    import time

    def seconds(page: str) -> float:
        best = 9.0
        for _ in range(3):
            began = time.perf_counter()
            text_of_html(page, 100_000)
            best = min(best, time.perf_counter() - began)
        return best

    for make in (lambda n: "<pre>" + " " * n + "x</pre>", lambda n: "<b>" * (n // 100), lambda n: "&amp;" * n):
        assert seconds(make(400_000)) < 40 * seconds(make(40_000)) + 0.05
