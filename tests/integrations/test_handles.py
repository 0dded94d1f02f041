"""Handles: only live ones of the right tenant are read, and no text can pass for one."""

from __future__ import annotations

import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from integration_cases import documents, open_engine, story

from lloco_engine import ConfigError, Document, GenerateConfig, SegmentUnavailable
from lloco_engine.decoder.local import LocalDecoder
from lloco_engine.testing import save_tiny_decoder
from lloco_integrations.chunks import check_on_missing, views
from lloco_integrations.handle_syntax import SENTINEL, Neutraliser, neutralise
from lloco_integrations.handles import HandleFragment, Handles
from lloco_integrations.prompt_parser import Frame, Message
from lloco_integrations.session import Session, usage_dict

SHORT = GenerateConfig(max_new_tokens=8)
TEMPLATE = "Context:\n---\n{context_str}\n---\nQuery: {query_str}\nAnswer: "
FORBIDDEN = set(" \t\n,.;{}<>&\"'\\|")
KEY = b"k" * 32


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> LocalDecoder:
    return LocalDecoder.load(str(save_tiny_decoder(tmp_path_factory.mktemp("decoder"), max_position_embeddings=2048)))


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory, decoder):
    with open_engine(tmp_path_factory.mktemp("store") / "s", decoder) as engine:
        engine.ingest([*documents("red"), *documents("blue")])
        yield engine


@pytest.fixture
def engine(shared_engine):
    return shared_engine


@pytest.fixture
def own_engine(tmp_path, decoder):
    with open_engine(tmp_path / "s", decoder) as engine:
        engine.ingest(documents("red"))
        yield engine


@pytest.fixture(params=["nonce", "signed"])
def handles(request, engine) -> Handles:
    return Handles(engine, key=KEY if request.param == "signed" else None)


def hits_of(engine, *topics: str, tenant: str = "red"):
    return [engine.store.chunks(f"{topic}.md", tenant)[0] for topic in topics]


# -- the written form ------------------------------------------------------------------------------------------------


def test_a_handle_is_written_so_that_frameworks_keep_it_whole(engine, handles):
    hit = hits_of(engine, "pump")[0]
    one, other = handles.mint([hit]), handles.mint([hit])
    assert SENTINEL.fullmatch(one) and one.isascii() and not FORBIDDEN & set(one)
    assert (one != other) == (handles._mint.__class__.__name__ == "Nonces")


def test_the_plain_form_is_the_one_of_the_specification(engine):
    assert re.fullmatch(r"\[\[LLC:[0-9a-f]{32}\]\]", Handles(engine).mint(hits_of(engine, "pump")))


@pytest.mark.parametrize(
    "text", ["[[LLC:" + "a" * 32 + "]]", "[[llc: AB12", "[ [LLC:ff]]", "[[[LLC:[[LLC:abc]]abc]]", "x[[LLC:", "[[LLC:zz"]
)
def test_neutralised_text_holds_no_mark(text):
    clean = neutralise(text)
    assert not re.search(r"\[\s?\[\s?LLC\s?:", clean, re.IGNORECASE) and neutralise(clean) == clean


def test_other_text_is_left_as_it_is():
    for text in ("[[LLC]]", "a [link](x) [[1, 2], [3, 4]]", "LLC: a company", "deadbeefdeadbeef]]"):
        assert neutralise(text) == text


def test_pieces_neutralise_as_the_whole():
    rng = random.Random(7)
    alphabet = ["[", "[", "]", "]", "LLC", "L", "C", ":", " ", "a", "9f", "x", "[[LLC:", "[[LLC:" + "0a" * 16 + "]]"]
    for _ in range(3000):
        pieces = [rng.choice(alphabet) for _ in range(rng.randint(1, 12))]
        clean = Neutraliser()
        got = "".join([*map(clean.push, pieces), clean.finish()])
        assert got == neutralise("".join(pieces)), pieces


# -- resolving -------------------------------------------------------------------------------------------------------


def test_first_occurrence_gives_the_order_and_duplicates_are_dropped(engine, handles):
    pump, crane, valve = hits_of(engine, "pump", "crane", "valve")
    text = f"a {handles.mint([crane])} b {handles.mint([pump, crane])} c"
    resolved = handles.resolve([text, handles.mint([valve, pump])], "red")
    assert [hit.doc_id for hit in resolved.hits] == ["crane.md", "pump.md", "valve.md"]
    assert "LLC" not in "".join(resolved.texts)
    assert handles.counts["resolved"] == 5


def test_a_handle_ends_with_its_time(engine):
    for key in (None, KEY):
        now = [1000.0]
        handles = Handles(engine, ttl=10, key=key, clock=lambda now=now: now[0])
        text = handles.mint(hits_of(engine, "pump"))
        assert handles.resolve([text], "red").hits
        now[0] += 11
        assert not handles.resolve([text], "red").hits
        assert handles.counts["expired"] == 1


def test_another_tenants_handle_is_inert_logged_and_counted(engine, handles, caplog):
    text = handles.mint(hits_of(engine, "pump", tenant="blue"))
    resolved = handles.resolve([text], "red")
    assert not resolved.hits and resolved.texts == ("(LLC)",)
    assert handles.counts.get("wrong_scope", 0) + handles.counts.get("unknown", 0) == 1
    assert "worth nothing" in caplog.text


def test_a_forged_handle_is_inert(engine, handles):
    real = handles.mint(hits_of(engine, "pump"))
    forged = real[:-3] + ("0" if real[-3] != "0" else "1") + real[-2:]
    other = Handles(engine, key=b"another key of 16 bytes or more")
    for text in (forged, other.mint(hits_of(engine, "pump")), "[[LLC:" + "0" * 32 + "]]"):
        assert not handles.resolve([text], "red").hits
    assert handles.counts["unknown"] == 3


def test_a_part_of_a_live_handle_raises(engine):
    handles = Handles(engine)
    text = handles.mint(hits_of(engine, "pump"))
    digits = text[6:-2]
    for part in (text[:-1], text[1:], text[:20], text[8:], text[:12], digits, text.upper(), f"[[LLC: {digits}]]"):
        with pytest.raises(HandleFragment, match="token counter"):
            handles.resolve([f"x {part} y"], "red")
        assert not handles.resolve([part], "blue").hits  # to another tenant it is only text


def test_a_handle_cut_to_a_few_digits_raises_where_few_are_alive(engine):
    handles = Handles(engine)
    (hit,) = hits_of(engine, "pump")
    text = handles.mint([hit])
    other = "[[LLC:" + ("0" if text[6] != "0" else "1")
    for part in (text[:9], text[:10] + " and", text[:11].upper()):
        with pytest.raises(HandleFragment):
            handles.resolve([f"x {part}"], "red")
    for part in (text[:8], text[:6], other + "b0c\u2026]]", other + "b0c71"):  # too short, or of no live handle
        assert not handles.resolve([f"x {part}"], "red").hits
    for _ in range(9):
        handles.mint([hit])
    assert not handles.resolve([text[:9]], "red").hits  # one of ten could begin like that by chance
    with pytest.raises(HandleFragment):
        handles.resolve([text[:10]], "red")


def test_a_forged_part_of_a_signed_handle_stops_no_page_and_a_cut_one_is_counted(engine):
    handles = Handles(engine, key=KEY)
    whole = handles.mint(hits_of(engine, "pump"))
    cut = whole[:-40]
    for text in (cut, "see [[LLC:0123456789abcdef", f"{hits_of(engine, 'pump')[0].segment_id}"):
        page = handles.resolve([f"x {text} y", whole], "red")
        assert [hit.doc_id for hit in page.hits] == ["pump.md"]
        assert "[[LLC" not in "".join(page.texts)
    assert handles.counts["unknown"] == 2


def test_what_is_kept_of_each_tenant_is_bounded(engine):
    handles = Handles(engine, most=3)
    (hit,), (foreign,) = hits_of(engine, "pump"), hits_of(engine, "pump", tenant="blue")
    other = handles.mint([foreign])
    minted = [handles.mint([hit]) for _ in range(5)]
    assert [bool(handles.resolve([text], "red").hits) for text in minted] == [False, False, True, True, True]
    assert handles.resolve([other], "blue").hits == (foreign,)  # whatever the others mint


def test_handles_are_revoked_for_one_tenant(engine, handles):
    (hit,), (foreign,) = hits_of(engine, "pump"), hits_of(engine, "pump", tenant="blue")
    before, other = handles.mint([hit]), handles.mint([foreign])
    handles.revoke("red")
    assert not handles.resolve([before], "red").hits
    assert handles.resolve([other], "blue").hits == (foreign,)
    after = handles.mint([hit])  # also in the same second
    assert [found.doc_id for found in handles.resolve([after], "red").hits] == ["pump.md"]
    assert not handles.resolve([before], "red").hits


def test_a_key_is_rotated_without_a_gap(engine):
    old, new = KEY, b"n" * 32
    (hit,) = hits_of(engine, "pump")
    before = Handles(engine, key=old).mint([hit])
    both = Handles(engine, key=[new, old])
    assert both.resolve([before], "red").hits and both.resolve([both.mint([hit])], "red").hits
    assert Handles(engine, key=new).resolve([both.mint([hit])], "red").hits  # the first one signs
    assert not Handles(engine, key=new).resolve([before], "red").hits
    with pytest.raises(ConfigError, match="at least one key"):
        Handles(engine, key=[])


def test_a_prompt_full_of_look_alikes_costs_linear_time(engine):
    rng = random.Random(5)
    handles = Handles(engine)
    (hit,) = hits_of(engine, "pump")
    handles.mint([hit] * 2000)

    def seconds(count: int) -> float:
        digits = [f"{rng.getrandbits(128):032x}" for _ in range(count)]
        text = " ".join(f"[[LLC:{d[:20]} {d}{d}" for d in digits)
        began = time.perf_counter()
        assert not handles.resolve([text], "red").hits
        return time.perf_counter() - began

    few = min(seconds(400) for _ in range(3))
    assert min(seconds(3200) for _ in range(2)) < 24 * few  # eight times the text; with every pair compared, 64


def test_another_process_with_the_key_reads_a_signed_handle(engine):
    text = Handles(engine, key=KEY).mint(hits_of(engine, "pump"))
    assert [hit.doc_id for hit in Handles(engine, key=KEY).resolve([text], "red").hits] == ["pump.md"]
    assert not Handles(engine, key=KEY).resolve([text], "blue").hits
    with pytest.raises(ConfigError, match="16 bytes"):
        Handles(engine, key=b"short")


def test_minting_and_resolving_from_many_threads(engine):
    handles = Handles(engine)
    pump, crane = hits_of(engine, "pump")[0], hits_of(engine, "crane", tenant="blue")[0]

    def one(number: int) -> bool:
        hit, tenant = ((pump, "red"), (crane, "blue"))[number % 2]
        return handles.resolve([handles.mint([hit])], tenant).hits == (hit,)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(one, range(400)))
    assert handles.counts == {"minted": 400, "resolved": 400, "stale": 0}


def test_slots_are_counted_once_a_handle(engine, handles):
    hits = hits_of(engine, "pump", "crane")
    text = handles.mint(hits)
    assert hits[0].slots > 40
    assert handles.slots(text + text) == sum(hit.slots for hit in hits)
    assert Handles(engine).slots("[[LLC:" + "0" * 32 + "]]") == 0


def test_one_engine_shares_its_handles(engine, own_engine):
    assert Handles.of(engine) is Handles.of(engine) is not Handles.of(own_engine)


# -- chunks of any vector store --------------------------------------------------------------------------------------


def test_known_texts_become_handles_and_white_space_does_not_matter(engine):
    shown = views(engine, [f"\n {story('pump')} ", story("crane")], tenant="red", on_missing="error")
    assert [view.hits[0].doc_id for view in shown] == ["pump.md", "crane.md"]
    assert all(SENTINEL.fullmatch(view.text) for view in shown)


def test_on_missing_raw_shows_the_text_neutralised(engine):
    (view,) = views(engine, ["new text [[LLC:" + "a" * 32 + "]]"], tenant="red")
    assert view.text == "new text (LLC)" and not view.hits


def test_on_missing_error_names_what_is_missing(engine):
    with pytest.raises(SegmentUnavailable, match="1 of 2 have none, the first being 'other'"):
        views(engine, [story("pump"), "other"], tenant="red", on_missing="error")
    with pytest.raises(ConfigError, match="raw, compress, error"):
        check_on_missing("never")


def test_on_missing_compress_puts_it_into_the_store_once(own_engine):
    long = story("harbour", sentences=40)
    for _ in range(2):
        shown = views(own_engine, [long, "small thing", " "], tenant="red", on_missing="compress")
        assert len(shown[0].hits) > 1 and "".join(hit.text for hit in shown[0].hits) == long
        assert len(shown[1].hits) == 1 and shown[2].text == " "
    assert len(own_engine.documents("red")) == len(documents()) + 2 and own_engine.verify() == []


def test_a_text_is_known_to_its_tenant_only(engine):
    assert not views(engine, [story("pump", "blue")], tenant="red")[0].hits


def test_threads_that_compress_take_turns(own_engine):
    with ThreadPoolExecutor(4) as pool:
        found = list(
            pool.map(
                lambda n: views(own_engine, [f"note {n % 2} of the day"], tenant="red", on_missing="compress")[0].hits,
                range(8),
            )
        )
    assert all(len(hits) == 1 for hits in found)


# -- asking ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def session(engine, handles) -> Session:
    return Session(
        engine, handles=handles, frames=[Frame(TEMPLATE)], system=[Frame("Be kind. {context_str}", question="")]
    )


def prompt(context: str, question: str = "Where is the pump?") -> str:
    return TEMPLATE.replace("{context_str}", context).replace("{query_str}", question)


def test_a_known_template_gives_the_engines_own_answer(engine, handles, session):
    hits = hits_of(engine, "pump", "crane")
    ask = session.read([Message("user", prompt("\n\n".join(handles.mint([hit]) for hit in hits)))], "red")
    assert (ask.question, ask.context, ask.verbatim) == ("Where is the pump?", "", False)
    ours = session.reply(ask, generate=SHORT).whole()
    own = engine.ask("Where is the pump?", hits=hits, tenant="red", generate=SHORT)
    assert (ours.text, ours.token_ids, ours.usage.prompt_slots) == (own.text, own.token_ids, own.usage.prompt_slots)
    assert usage_dict(ours)["prompt_tokens"] > own.usage.prompt_slots > 0


def test_raw_chunks_beside_handles_become_context(engine, handles, session):
    text = prompt(f"{handles.mint(hits_of(engine, 'pump'))}\n\nThe kettle is red.\n\nThe boat is blue.")
    ask = session.read([Message("user", text)], "red")
    assert ask.context == "The kettle is red.\n\nThe boat is blue." and len(ask.hits) == 1
    assert (
        session.reply(ask, generate=SHORT).whole().text
        == engine.ask(ask.question, hits=ask.hits, context=ask.context, tenant="red", generate=SHORT).text
    )


def test_a_users_own_template_is_kept_word_for_word(engine, handles, session):
    text = f"Read:\n{handles.mint(hits_of(engine, 'pump', 'crane'))}\n\nNow list all halls."
    ask = session.read([Message("user", text)], "red")
    assert ask.question == "Read:\n(the text above)\n\nNow list all halls." and ask.verbatim and len(ask.hits) == 2


def test_a_conversation_keeps_its_turns_and_its_old_handles_stay_inert(engine, handles, session):
    old, new = handles.mint(hits_of(engine, "crane")), handles.mint(hits_of(engine, "pump"))
    messages = [
        Message("system", f"Be kind. {new}"),
        Message("system", "Speak like a pirate."),
        Message("user", prompt(old, "First?")),
        Message("assistant", f"It is {old}."),
        Message("user", "And the pump?"),
    ]
    ask = session.read(messages, "red")
    assert [hit.doc_id for hit in ask.hits] == ["pump.md"]
    assert (ask.question, ask.verbatim, ask.context) == ("And the pump?", False, "Speak like a pirate.")
    assert [turn.role for turn in ask.history] == ["user", "assistant"] and "LLC:" not in str(ask.history)
    assert session.reply(ask, generate=SHORT).whole().usage.prompt_slots == ask.hits[0].slots


def test_a_tools_result_is_context_of_the_last_question_only(engine, handles, session):
    def messages(*more):
        result = handles.mint(hits_of(engine, "pump")) + "\nA note."
        return [Message("user", "Where?"), Message("assistant", ""), Message("tool", result), *more]

    ask = session.read(messages(), "red")
    assert (ask.question, len(ask.hits), ask.context) == ("Where?", 1, "A note.")
    later = session.read(messages(Message("assistant", "There."), Message("user", "Thanks?")), "red")
    assert not later.hits and later.question == "Thanks?" and later.verbatim


def test_a_prompt_without_memory_is_asked_as_it_is(engine, session):
    ask = session.read([Message("user", "Say [[LLC:" + "b" * 32 + "]] hello.")], "red")
    assert (ask.question, ask.hits, ask.verbatim) == ("Say (LLC) hello.", (), True)
    answer = session.reply(ask, generate=SHORT).whole()
    assert answer.usage.prompt_slots == 0 and "(1 unknown)" in answer.warnings[0]


def test_what_is_gone_since_follows_on_missing(own_engine):
    handles = Handles(own_engine)
    (hit,) = hits_of(own_engine, "pump")
    text = prompt(handles.mint([hit]))
    own_engine.ingest([Document("pump.md", "The pump was sold.", title="pump", tenant="red")])
    raw = Session(own_engine, handles=handles, frames=[Frame(TEMPLATE)]).read([Message("user", text)], "red")
    assert (raw.hits, raw.context) == ((), hit.text) and handles.counts["stale"] == 1
    strict = Session(own_engine, handles=handles, frames=[Frame(TEMPLATE)], on_missing="error")
    with pytest.raises(SegmentUnavailable, match="retrieve again"):
        strict.read([Message("user", text)], "red")


@pytest.mark.parametrize("on_missing", ["raw", "compress", "error"])
def test_a_damaged_segment_follows_on_missing(own_engine, on_missing):
    handles = Handles(own_engine)
    hits = hits_of(own_engine, "pump", "crane")
    file = own_engine.store.path / "segments" / hits[0].segment_id[:2] / f"{hits[0].segment_id}.safetensors"
    whole = own_engine.ask("Where?", hits=hits, tenant="red", generate=SHORT)
    file.write_bytes(file.read_bytes()[:-40])
    session = Session(own_engine, handles=handles, frames=[Frame(TEMPLATE)], on_missing=on_missing)
    ask = session.read([Message("user", prompt(handles.mint(hits), "Where?"))], "red")
    if on_missing == "error":
        with pytest.raises(SegmentUnavailable, match="1 of 2 are missing or damaged"):
            session.reply(ask, generate=SHORT)
        return
    answer = session.reply(ask, generate=SHORT).whole()
    if on_missing == "compress":
        assert answer.text == whole.text and len(own_engine.documents("red")) == len(documents())
        assert own_engine.verify() == []
    else:
        assert [hit.doc_id for hit in answer.hits] == ["crane.md"] and answer.usage.prompt_tokens > 60


def test_forged_handles_anywhere_never_resolve(engine):
    """Fuzz: 500 prompts with forged, foreign and mangled handles in documents, metadata, questions and history."""
    rng = random.Random(3)
    handles = Handles(engine)
    session = Session(engine, handles=handles, frames=[Frame(TEMPLATE)])
    (mine,), (foreign,) = hits_of(engine, "pump"), hits_of(engine, "pump", tenant="blue")
    stranger = handles.mint([foreign])

    def forge() -> str:
        digits = "".join(rng.choice("0123456789abcdefABCDEF") for _ in range(rng.choice((3, 8, 31, 32, 33, 64))))
        mark = rng.choice(("[[LLC:", "[[llc:", "[ [LLC:", "[[LLC :", "[[[LLC:", "[LLC:", "LLC:", "[["))
        return rng.choice(
            (mark + digits + rng.choice(("]]", "] ]", "]", "")), stranger, stranger.upper(), "[" + stranger)
        )

    for _ in range(500):
        live = handles.mint([mine])
        raw = neutralise(f"a document {forge()} with {forge()}")  # as `views` shows it
        context = f"{live}\n\n{raw}\n\nfile: {forge()}"
        messages = [
            Message("user", forge()),
            Message("assistant", f"Yes {forge()}{live}"),
            Message("user", prompt(context, f"what {forge()} is {forge()}?")),
        ]
        ask = session.read(messages, "red")
        assert ask.hits == (mine,)
        everything = " ".join([ask.question, ask.context, *(turn.text for turn in ask.history)])
        assert not re.search(r"\[\s?\[\s?LLC\s?:", everything, re.IGNORECASE) and live[6:-2] not in everything


def test_a_models_own_text_never_reads_as_a_handle(engine, handles, session, monkeypatch):
    from lloco_engine import Answer, AnswerStream

    pieces = ["It is [", "[LLC:", "ab" * 16, "]] so."]
    fake = AnswerStream(iter(pieces), (), lambda: Answer("".join(pieces)))
    monkeypatch.setattr(engine, "stream", lambda *_, **__: fake)
    reply = session.reply(session.read([Message("user", "Where?")], "red"))
    assert "".join(reply) == reply.answer.text == "It is (LLC) so."


async def test_the_async_reply_is_the_sync_one(engine, handles, session):
    ask = session.read([Message("user", prompt(handles.mint(hits_of(engine, "pump"))))], "red")
    reply = session.areply(ask, generate=SHORT)
    pieces = [piece async for piece in reply]
    assert "".join(pieces) == reply.answer.text == session.reply(ask, generate=SHORT).whole().text
    threads = {thread.name for thread in threading.enumerate()}
    assert (await session.areply(ask, generate=SHORT).whole()).text == reply.answer.text and threads is not None
