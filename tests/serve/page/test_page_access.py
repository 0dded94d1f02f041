"""Everybody can use the page: in both themes, on a phone, by keyboard, with a screen reader, without motion."""

from __future__ import annotations

import pytest
import serve_cases
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect
from test_page import answered, ask

pytestmark = pytest.mark.browser

LONG = "Which pump, " + "n" * 300 + "?"


def faults(page: Page) -> list[str]:
    """What axe-core finds that is serious or critical, with the elements."""
    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {node['html'][:120]}"
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]


def check(page: Page) -> None:
    assert faults(page) == []
    seen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth, document.body.scrollWidth]")
    assert seen[0] <= seen[1] and seen[2] <= seen[1], f"the page scrolls sideways: {seen}"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", ["desk", "phone"])
def test_axe_finds_nothing_serious_and_nothing_scrolls_sideways(opens, theme, width, picture, tmp_path):
    page = opens(theme=theme, width=width, reduced_motion="reduce")

    def look(name: str) -> None:
        check(page)
        picture(page, f"{theme}-{width}-{name}")

    look("1-welcome")
    ask(page, LONG)
    answered(page)
    expect(page.locator(".card").first).to_be_visible()
    look("2-answer")
    page.get_by_role("button", name="Read around source 1").click()
    expect(page.locator(".stretch")).to_be_visible()
    look("3-reading")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Start over").click()
    ask(page, serve_cases.QUESTION, mode="Beside text")
    expect(page.locator(".columns .measures > div")).to_have_count(12)
    answered(page)
    look("4-beside")
    page.get_by_role("link", name="Documents").click()
    broken = tmp_path / ("b" * 120 + ".pdf")
    broken.write_bytes(b"no pdf")
    page.locator("#files").set_input_files(broken)
    expect(page.locator(".upload .problem")).to_be_visible()
    look("5-documents")
    page.get_by_role("button", name="Delete Pumps").click()
    look("6-confirm")
    page.keyboard.press("Escape")
    page.get_by_role("button", name=f"Cancel {broken.name}").click()


def test_axe_sees_a_fault_that_is_there(page):
    page.evaluate("document.getElementById('send').textContent = ''")
    assert any("button-name" in fault for fault in faults(page))


def test_the_keyboard_reaches_everything(opens):
    page = opens("#/documents")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport()
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    expect(page.locator("#page-documents")).to_be_visible()  # the skip link leads to no other part of the page
    page.keyboard.press("Tab")
    expect(page.locator("#files")).to_be_focused()
    ring = page.evaluate("getComputedStyle(document.getElementById('choose')).outlineStyle")
    assert ring == "solid"
    page.get_by_role("button", name="Delete Pumps").focus()
    page.keyboard.press("Enter")
    names = []
    for _ in range(5):  # the focus stays within the dialog
        names.append(page.evaluate("document.activeElement.closest('dialog')?.id ?? document.activeElement.tagName"))
        page.keyboard.press("Tab")
    assert set(names) <= {"confirm", "BODY"} and "confirm" in names
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Delete Pumps")).to_be_focused()


def test_a_question_is_asked_and_its_sources_are_read_by_keyboard(page):
    expect(page.get_by_role("textbox", name="Your question")).to_be_focused()
    page.keyboard.type("Which pump")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("stands in hall 3?")
    page.keyboard.press("Enter")
    expect(page.locator(".question")).to_have_text("Which pump\nstands in hall 3?", use_inner_text=False)
    answered(page)
    expect(page.get_by_role("textbox", name="Your question")).to_be_focused()
    page.get_by_role("button", name="Read around source 1").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Read around source 1")).to_be_focused()


def test_escape_stops_an_answer(page):
    ask(page, serve_cases.QUESTION, longest=900)
    expect(page.locator(".live[aria-busy=true] .answer")).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped.")).to_be_visible()


def test_an_answer_is_read_out_once_it_is_whole(page):
    ask(page, serve_cases.QUESTION, longest=900)
    live = page.locator(".live")
    expect(live).to_have_attribute("aria-live", "polite")
    expect(live).to_have_attribute("aria-busy", "true")
    page.keyboard.press("Escape")
    expect(live).to_have_attribute("aria-busy", "false")


def test_without_motion_nothing_moves(opens):
    page = opens(reduced_motion="reduce")
    ask(page, serve_cases.QUESTION, longest=900)
    expect(page.locator(".live[aria-busy=true] .answer")).not_to_be_empty()
    assert page.evaluate("document.getAnimations().length") == 0
    page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped.")).to_be_visible()
