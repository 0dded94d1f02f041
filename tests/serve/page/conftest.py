"""A real browser before a real server. Whatever a test does, the page keeps to its content security policy, asks no
other host and raises no error."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import serve_cases
from page_cases import FOXES, LOCKS

from lloco_engine import Engine

playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install 'lloco[dev]'")
pytest.importorskip("axe_playwright_python", reason="needs axe-core: pip install 'lloco[dev]'")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright.expect.set_options(timeout=20_000)
WIDTHS = {"desk": (1280, 860), "phone": (390, 844)}
Opens = Callable[..., "playwright.Page"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a browser where there is none."""
    for item in items:
        if CHROMIUM is None and "browser" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs Chromium: apt-get install chromium"))


@pytest.fixture(scope="module")
def engine(empty_store) -> Iterator[Engine]:
    """An engine with documents of pages, of markup and of neither."""
    with empty_store() as made:
        made.ingest([serve_cases.PUMPS, serve_cases.CRANES, FOXES, LOCKS])
        made.ask(serve_cases.QUESTION, max_new_tokens=1)  # compiles the kernel, where that has never been done
        yield made


@pytest.fixture(scope="session")
def browser() -> Iterator[playwright.Browser]:
    """Chromium, without a window."""
    with playwright.sync_playwright() as made:
        chromium = made.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def opens(browser, address) -> Iterator[Opens]:
    """Opens the page as who looks at it: in a theme, at a width, at a part of the page."""
    faults: list[str] = []
    contexts = []

    def open_page(
        place: str = "#/ask",
        *,
        theme: str = "light",
        width: str = "desk",
        at: str = address,
        ready: bool = True,
        allowed: tuple[str, ...] = (),
        **context: object,
    ) -> playwright.Page:
        """``allowed``: what the console may say, for tests of what goes wrong; ``ready``: wait for the store's list."""
        size = {"width": WIDTHS[width][0], "height": WIDTHS[width][1]}
        contexts.append(browser.new_context(viewport=size, color_scheme=theme, **context))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("request", lambda asked: asked.url.startswith((at, "data:")) or faults.append(f"asked {asked.url}"))
        page.on("dialog", lambda dialog: faults.append(f"a script ran: {dialog.message}"))
        page.on(
            "console",
            lambda said: (
                said.type in ("error", "warning")
                and not any(words in said.text for words in allowed)
                and faults.append(f"console: {said.text} ({said.location['url']})")
            ),
        )
        page.goto(f"{at}/{place}")
        if ready:
            playwright.expect(page.locator("#documents")).to_have_attribute("aria-busy", "false")
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.ran") is None, "a script of a document ran"
        context.close()
    assert not faults, faults


@pytest.fixture
def page(opens) -> playwright.Page:
    """The page, on a desk, in the light."""
    return opens()


@pytest.fixture
def picture(request) -> Callable[[playwright.Page, str], None]:
    """Writes what is seen into the folder of ``--screenshots``, where there is one."""
    folder = request.config.getoption("--screenshots")

    def write(page: playwright.Page, name: str) -> None:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=Path(folder) / f"{name}.png")

    return write
