"""The page does what it says, in a real browser before a real server."""

from __future__ import annotations

import itertools
import json
import re
import threading
from typing import Any

import httpx
import pytest
import serve_cases
from page_cases import FOXES
from playwright.sync_api import Page, expect

from lloco_engine.compress.uncompressed import Uncompressed
from lloco_engine.serve.app import create_app
from lloco_engine.serve.keys import KeyFile
from lloco_engine.serve.limits import Limits
from lloco_engine.serve.running import listening

pytestmark = pytest.mark.browser

FOX = "Which fox ate the cheese?"


def ask(page: Page, question: str, mode: str = "Answer", longest: int = 12) -> None:
    if page.locator("#settings").is_hidden():
        page.get_by_role("button", name="Settings").click()
    page.get_by_label("Longest answer").fill(str(longest))
    page.get_by_role("group", name="How to answer").get_by_text(mode, exact=True).click()
    field = page.get_by_role("textbox", name="Your question")
    field.fill(question)
    field.press("Enter")


def answered(page: Page) -> None:
    expect(page.locator(".live[aria-busy=true]")).to_have_count(0)
    expect(page.locator(".problem:visible")).to_have_count(0)


def test_an_answer_is_the_servers_and_names_what_it_stands_on(page, address):
    asked = {"messages": serve_cases.user(serve_cases.QUESTION), "model": "lloco", "max_new_tokens": 12}
    told = httpx.post(f"{address}/v1/chat/completions", json=asked, timeout=30).json()
    ask(page, serve_cases.QUESTION)
    answered(page)
    assert page.locator(".answer").text_content() == told["choices"][0]["message"]["content"]
    sources = told["lloco"]["sources"]
    assert sources
    expect(page.locator(".card")).to_have_count(len(sources))
    assert page.locator(".card mark").all_text_contents() == [source["quote"] for source in sources]
    expect(page.locator(".card").first).to_contain_text(f"{sources[0]['score']:.2f}")
    usage = told["lloco"]["usage"]
    costs = f"{usage['slots']} slots in place of {usage['source_tokens']} tokens"
    expect(page.locator(".costs")).to_contain_text(costs)
    expect(page.locator("#spoken")).to_have_text(re.compile(r"Answered, with \d+ source"))


def test_an_answer_is_written_piece_by_piece_and_can_be_stopped(page):
    ask(page, serve_cases.QUESTION, longest=900)
    expect(page.locator(".live[aria-busy=true] .answer")).not_to_be_empty()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Stopped.")).to_be_visible()
    expect(page.get_by_role("textbox", name="Your question")).to_be_focused()
    expect(page.locator(".live[aria-busy=true]")).to_have_count(0)
    expect(page.locator(".card")).to_have_count(0)


def test_what_was_said_before_goes_with_the_next_question_until_one_starts_over(page):
    sent: list[list[dict[str, str]]] = []
    page.on("request", lambda one: "completions" in one.url and sent.append(json.loads(one.post_data)["messages"]))
    ask(page, serve_cases.QUESTION)
    answered(page)
    ask(page, "And in hall 4?")
    expect(page.locator(".turn")).to_have_count(2)
    answered(page)
    page.get_by_role("button", name="Start over").click()
    expect(page.locator(".turn")).to_have_count(0)
    ask(page, FOX)
    answered(page)
    assert [[one["role"] for one in messages] for messages in sent] == [
        ["user"], ["user", "assistant", "user"], ["user"],
    ]  # fmt: skip
    assert sent[1][2] == {"role": "user", "content": "And in hall 4?"}


def test_a_source_opens_where_its_quote_stands_and_shows_more_around_it(page, engine):
    ask(page, FOX)
    answered(page)
    quote = page.locator(".card mark").first.text_content()
    opener = page.get_by_role("button", name="Read around source 1")
    opener.click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading")).to_contain_text("Foxes <img")
    mark = dialog.locator("mark")
    expect(mark).to_have_text(quote, use_inner_text=False)
    expect(mark).to_be_in_viewport()
    whole = engine.store.document_text(FOXES.doc_id, "")
    assert dialog.locator(".stretch").text_content() == whole  # all of it, and the quote in its place
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(opener).to_be_focused()


def test_a_long_document_is_read_on_from_a_source_and_its_page_is_named(page, engine):
    ask(page, "Who oiled the lock of gate number seven?")
    answered(page)
    card = page.locator(".card", has_text="Locks").first
    expect(card.locator(".card-foot")).to_contain_text(re.compile(r"Page (iv|2|3)"))
    card.get_by_role("button").click()
    stretch = page.get_by_role("dialog").locator(".stretch")
    expect(stretch).to_be_visible()
    whole = engine.store.document_text("locks.md", "")
    for name in ("Earlier", "Later"):
        button = page.get_by_role("dialog").get_by_role("button", name=name)
        while button.is_visible():
            before = len(stretch.text_content())
            button.click()
            expect(button).to_be_enabled()
            assert len(stretch.text_content()) > before or button.is_hidden()
    assert stretch.text_content() == whole


def test_three_ways_stand_beside_each_other_with_what_they_cost(page, picture, address):
    ask(page, serve_cases.QUESTION, mode="Beside text")
    expect(page.locator(".columns .measures > div")).to_have_count(12)
    answered(page)
    finals: dict[str, dict[str, Any]] = {}
    asked = {"question": serve_cases.QUESTION, "max_new_tokens": 12}
    told = httpx.post(f"{address}/lloco/compare", json=asked, timeout=30).text
    for event in told.split("\n\n"):
        if '"final"' in event:
            name, data = event.split("\n", 1)
            finals[name.removeprefix("event: ")] = json.loads(data.removeprefix("data: "))["final"]
    assert list(finals) == ["lloco", "text_retrieval", "in_context"]
    for method, final in finals.items():
        column = page.locator(f".column.{method}")
        assert column.locator(".answer").text_content() == final["answer"]
        slots = f" + {final['slots']} slots" if final["slots"] else " tokens"
        expect(column.locator("dd").first).to_have_text(f"{final['prompt_tokens']}{slots}")
    bars = page.locator(".column dl > div:first-child .bar i").evaluate_all("all => all.map(one => one.style.width)")
    prompts = [final["prompt_tokens"] + final["slots"] for final in finals.values()]
    assert [float(width.rstrip("%")) for width in bars] == pytest.approx(
        [100 * prompt / max(prompts) for prompt in prompts], abs=0.01
    )
    expect(page.locator(".card")).to_have_count(len(finals["lloco"]["sources"]))
    picture(page, "beside")


def test_files_are_sent_compressed_listed_and_deleted(opens, engine, tmp_path, picture, monkeypatch):
    made, seen, make = itertools.count(), threading.Event(), Uncompressed.make

    def after_two_segments_wait(*args):
        if next(made) == 2:
            seen.wait(30)
        return make(*args)

    monkeypatch.setattr(Uncompressed, "make", after_two_segments_wait)
    page = opens("#/documents")
    mills = tmp_path / "mills.md"
    mills.write_text("# Mills\n\n" + "The mill of Ondra has nine wheels. " * 60)
    broken = tmp_path / "broken.pdf"
    broken.write_bytes(b"no pdf")
    page.get_by_label("Group").fill("water")
    page.locator("#files").set_input_files([mills, broken])
    page.get_by_text(re.compile(r"Compressing, \d+ of \d+ segments")).wait_for()
    picture(page, "uploading")
    seen.set()
    row = page.locator(".document", has_text="mills.md")
    expect(row).to_contain_text("water")
    expect(page.locator(".upload .problem")).to_contain_text("the PDF is damaged")
    (info,) = [one for one in engine.documents("") if one.source.endswith("mills.md")]
    expect(row).to_contain_text(f"{info.source_tokens:,} → {info.slots:,}")
    page.get_by_role("button", name="Cancel broken.pdf").click()
    expect(page.locator(".upload")).to_have_count(0)

    delete = row.get_by_role("button", name=re.compile("^Delete"))
    delete.click()
    expect(page.get_by_role("button", name="Keep it")).to_be_focused()
    page.keyboard.press("Escape")
    expect(delete).to_be_focused()
    assert info.doc_id in [one.doc_id for one in engine.documents("")]
    delete.click()
    page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    expect(row).to_have_count(0)
    assert info.doc_id not in [one.doc_id for one in engine.documents("")]


def test_a_dropped_file_is_taken(opens, engine):
    page = opens("#/documents")
    dropped = page.evaluate_handle(
        """() => {
            const data = new DataTransfer();
            data.items.add(new File(["The dropped bell rang twice."], "bell <i>&.txt", { type: "text/plain" }));
            return data;
        }"""
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
    row = page.locator(".document", has_text="bell <i>&.txt")
    expect(row).to_be_visible()
    row.get_by_role("button").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    expect(row).to_have_count(0)


def test_markup_of_documents_is_shown_as_text_and_runs_nothing(opens, tmp_path):
    page = opens("#/documents")
    named = tmp_path / "<img src=x onerror=alert(1)>.md"
    named.write_text("# <script>alert(2)</script>\n\nA stork <b onclick=alert(3)>stands</b> here.")
    page.locator("#files").set_input_files(named)
    row = page.locator(".document", has_text="A stork").or_(page.locator(".document", has_text="onerror=alert(1)"))
    expect(row.first).to_be_visible()
    expect(page.locator(".document", has_text="Foxes <img src=x onerror='window.ran=1'><script>")).to_be_visible()
    page.get_by_role("link", name="Ask").click()
    ask(page, "<script>alert(4)</script> Which fox, and which stork <img src=x onerror=alert(5)>?")
    answered(page)
    expect(page.locator(".question")).to_contain_text("<script>alert(4)</script>")
    page.get_by_role("button", name="Read around source 1").click()
    expect(page.get_by_role("dialog").locator(".stretch")).to_be_visible()
    assert page.locator("main, dialog").locator("img, script, b, i:not(.bar i, .unseen)").count() == 0
    page.keyboard.press("Escape")
    page.get_by_role("link", name="Documents").click()
    row.first.get_by_role("button", name=re.compile("^Delete")).click()
    page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    expect(row).to_have_count(0)


def test_an_error_is_said_where_it_happened_and_the_question_can_be_asked_again(opens):
    page = opens(allowed=("400",))
    ask(page, "word " * 10_000)
    expect(page.get_by_role("alert")).to_contain_text("at most 32,000 characters")
    ask(page, serve_cases.QUESTION)
    expect(page.locator(".turn")).to_have_count(2)
    expect(page.locator(".card").first).to_be_visible()


def test_a_server_with_keys_asks_for_one_and_one_that_only_reads_changes_nothing(opens, empty_store, keys_file):
    file = KeyFile(keys_file)
    key, _ = file.add("acme", "read")
    with empty_store() as engine, listening(create_app(engine, keys=file)) as where:
        engine.ingest([serve_cases.PUMPS], tenant="acme")
        page = opens(at=where, ready=False, allowed=("401",))
        dialog = page.get_by_role("dialog", name="API key")
        field = dialog.get_by_label("Key")
        expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        expect(dialog.get_by_role("alert")).to_be_visible()
        field.fill(key)
        field.press("Enter")
        expect(dialog).to_be_hidden()
        expect(page.locator("#count")).to_have_text("1")
        kept = page.evaluate("[sessionStorage.getItem('lloco-key'), localStorage.length, document.cookie]")
        assert kept == [key, 0, ""]
        page.get_by_role("link", name="Documents").click()
        expect(page.get_by_role("heading", name="Pumps")).to_be_visible()
        expect(page.locator("#drop")).to_be_hidden()
        assert page.get_by_role("button", name=re.compile("^Delete")).count() == 0


def test_a_store_without_documents_says_how_to_begin(opens, empty_store):
    with empty_store() as engine, listening(create_app(engine)) as where:
        page = opens(at=where)
        page.get_by_role("link", name="Add a document").click()
        expect(page.get_by_text("Nothing here yet.")).to_be_visible()
        expect(page.locator("#store")).to_be_empty()


def test_a_file_that_is_too_large_is_not_sent(opens, empty_store, tmp_path):
    large = tmp_path / "large.txt"
    large.write_text("word " * 1000)
    with empty_store() as engine, listening(create_app(engine, limits=Limits(upload_bytes=4000))) as where:
        page = opens("#/documents", at=where)
        page.locator("#files").set_input_files(large)
        expect(page.get_by_role("alert")).to_have_text("A file may have at most 4 kB; this one has 5 kB.")


def test_a_server_that_is_away_is_said_and_found_again(opens):
    page = opens(allowed=("ERR_FAILED", "ERR_INTERNET_DISCONNECTED"))
    page.context.set_offline(True)
    expect(page.locator("#offline")).to_contain_text("cannot be reached")
    ask(page, serve_cases.QUESTION)
    expect(page.locator(".turn .problem")).to_contain_text("cannot be reached")
    page.context.set_offline(False)
    expect(page.locator("#offline")).to_be_hidden()


def test_the_theme_is_the_systems_until_another_is_chosen_and_stays(opens):
    page = opens(theme="dark")
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Theme: of the system").click()
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark != light
    page.reload()
    expect(page.get_by_role("button", name="Theme: light")).to_be_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light
