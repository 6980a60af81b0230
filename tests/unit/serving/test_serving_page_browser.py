"""The page for people in a real Chromium, against a live server.

Needs the system's browser, `apt-get install chromium` (Debian, Ubuntu); Playwright's package brings none along.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
from live import live
from page_server import LIMITS, PageServer
from PIL import Image
from serving_fakes import EN_FR

from eagleray_serving.keys import KeyFile, new_key

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no Playwright here; install it with: pip install --editable '.[dev]'"
)
expect = playwright.expect
pytestmark = pytest.mark.slow

TIMEOUT_MS = 20_000
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VIEWS = [(1280, 900), (360, 740)]
# What a browser itself reports of an answer that is no 2xx, or of none.
EXPECTED_LINES = ("Failed to load resource",)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("no Chromium here; install it with: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found)
        expect.set_options(timeout=TIMEOUT_MS)
        yield chromium
        chromium.close()


@pytest.fixture
def server() -> PageServer:
    return PageServer()


@pytest.fixture
def url(server: PageServer) -> Iterator[str]:
    with live(server) as url:
        yield url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    yield from opened(browser, url)


def opened(browser: Browser, url: str) -> Iterator[Page]:
    """Open the page; at its end nothing was asked elsewhere and nothing was refused by its own policy."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-US")
    page = context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    asked: list[str] = []
    complaints: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(EXPECTED_LINES):
            complaints.append(message.text)

    page.on("request", lambda request: asked.append(request.url))
    page.on("console", note)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    yield page
    context.close()
    assert complaints == []
    assert {urlsplit(each).netloc for each in asked} == {urlsplit(url).netloc}


def send(page: Page, text: str) -> None:
    page.get_by_role("textbox", name="Text").fill(text)
    page.get_by_role("button", name="Translate").click()


def test_a_model_is_chosen_and_answers_with_its_version_time_and_replicas(page: Page) -> None:
    models = page.get_by_role("navigation", name="Models").get_by_role("radio")
    expect(models).to_have_count(4)
    expect(page.get_by_role("heading", name="en-fr")).to_be_visible()
    expect(page.locator("#subtitle")).to_have_text("English to French")
    expect(page.locator("#server")).to_have_text("4 models, 4 replicas, all ready")
    expect(page.locator("#replicas")).to_contain_text("1 ready")
    expect(page.locator("#replicas")).to_contain_text("340 tokens waiting")
    expect(page.locator("#about-facts")).to_contain_text("0.9875")
    page.get_by_text("Scores by kind").click()
    rows = page.locator("#kinds-table tr")
    assert [row.inner_text().split() for row in rows.all()] == [
        ["kind", "exact_match", "chrf"],
        ["date", "1", "99.5"],
        ["unit", "0.9"],
    ]
    send(page, "tuesday, december 5")
    expect(page.locator("#answer")).to_have_text("TUESDAY, DECEMBER 5")
    expect(page.locator("#answer")).to_have_attribute("aria-busy", "false")
    expect(page.locator("#fact-version")).to_have_text(EN_FR.version)
    assert "ms, first words after" in page.locator("#fact-time").inner_text()
    assert len(page.locator("#fact-request").inner_text()) == 32
    expect(page.locator("#curl")).to_contain_text("""-d '{"text":"tuesday, december 5"}'""")


def test_a_canary_is_shown_with_its_share_and_its_figures(page: Page) -> None:
    facts = page.locator("#about-facts")
    for words in (
        "production",
        "r2-step-00000400, 10 %",
        "12 requests, 1 error; half of them within 18.5 ms, 95 % within 40 ms",
        "r1-step-00000900: chrf is lower",
    ):
        expect(facts.get_by_text(words, exact=True)).to_be_visible()


def test_a_translation_grows_and_can_be_stopped(browser: Browser) -> None:
    server = PageServer(pause_s=0.02)
    with live(server) as url:
        for page in opened(browser, url):
            send(page, "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2)
            expect(page.locator("#answer")).to_contain_text("A B C")
            expect(page.locator("#answer")).to_have_attribute("aria-busy", "true")
            page.get_by_role("button", name="Stop").click()
            expect(page.locator("#phase")).to_have_text("Stopped: this is how far it came.")
            expect(page.get_by_role("button", name="Stop")).to_be_hidden()
            expect(page.get_by_role("button", name="Translate")).to_be_enabled()
            assert page.locator("#answer").inner_text().startswith("A B C")
            page.wait_for_timeout(100)
            assert server.translator.was_closed


def test_scores_are_bars_the_best_first_and_all_of_them_on_demand(page: Page) -> None:
    page.get_by_role("radio", name="langid").check()
    page.get_by_role("textbox", name="Text").fill("bonjour")
    page.get_by_role("button", name="Classify").click()
    bars = page.locator(".bars li")
    expect(bars).to_have_count(8)
    expect(bars.first).to_have_text("fr61.0 %")
    widths = [bar.bounding_box() for bar in page.locator(".bar-fill").all()]
    sizes = [box["width"] if box else 0 for box in widths]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 4 * sizes[1] > 0
    page.get_by_role("button", name="All 12 labels").click()
    expect(bars).to_have_count(12)


def test_an_image_is_shown_and_classified_and_a_task_of_ones_own_takes_json(page: Page) -> None:
    page.get_by_role("radio", name="digits").check()
    expect(page.get_by_role("button", name="Classify")).to_be_disabled()
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(stream, "PNG")
    page.get_by_label("Image (PNG or JPEG)").set_input_files(
        {"name": "seven.png", "mimeType": "image/png", "buffer": stream.getvalue()}
    )
    expect(page.locator("#image-words")).to_have_text("seven.png: 8 x 8, 1 kB")
    expect(page.get_by_role("img", name="The chosen image")).to_be_visible()
    page.get_by_role("button", name="Classify").click()
    expect(page.locator(".bars li").first).to_have_text("791.0 %")

    page.get_by_role("radio", name="own").check()
    field = page.get_by_label("One input, as JSON")
    expect(field).to_have_value('{\n  "left": "",\n  "right": ""\n}')
    field.fill('{"left": 1, ')
    expect(page.get_by_role("button", name="Predict")).to_be_disabled()
    field.fill('{"left": 1, "right": 2}')
    page.get_by_role("button", name="Predict").click()
    expect(page.locator("#answer")).to_contain_text('"echo": 1')


def test_the_length_is_counted_as_the_server_counts_and_a_refusal_is_in_its_own_words(page: Page) -> None:
    limit = LIMITS["max_item_characters"]
    field = page.get_by_label("Text in English")
    field.fill("\N{SNAKE}" * 3)
    expect(page.locator("#count")).to_have_text(f"3 of {limit} characters")
    send(page, "x" * 125)
    expect(page.locator("#count")).to_have_text(f"125 of {limit} characters: 5 too many")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("text[0] has 125 characters; the limit is 120")
    expect(alert).to_contain_text("split the text")
    expect(alert).to_contain_text("413 text_too_long, request ")
    send(page, "short")
    expect(page.locator("#answer")).to_have_text("SHORT")
    expect(alert).to_be_hidden()


def test_a_busy_server_is_tried_again_when_it_says_so(page: Page, server: PageServer) -> None:
    server.translator.num_refusals = 1
    send(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text("65536 tokens are waiting")
    again = page.locator("#again")
    expect(again).to_have_text("Try again in 1 s")
    expect(again).to_be_disabled()
    expect(again).to_have_text("Try again")
    again.click()
    expect(page.locator("#answer")).to_have_text("HELLO")


def test_a_server_that_goes_away_is_told_of_and_found_again(browser: Browser) -> None:
    server = PageServer()
    with ExitStack() as first:
        url = first.enter_context(live(server))
        for page in opened(browser, url):
            expect(page.locator("#server")).to_contain_text("all ready")
            first.close()
            send(page, "hello")
            expect(page.get_by_role("alert")).to_contain_text("The server does not answer.")
            expect(page.locator("#server")).to_contain_text("does not answer")
            with live(server, urlsplit(url).port or 0):
                expect(page.locator("#server")).to_contain_text("all ready")
                page.get_by_role("button", name="Try again").click()
                expect(page.locator("#answer")).to_have_text("HELLO")


def test_keys_are_asked_for_in_words_and_kept_in_the_tab_alone(browser: Browser, tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key, kept = new_key("one", ["translate"])
    file.add(kept)
    with live(PageServer(str(file.path))) as url:
        for page in opened(browser, url):
            expect(page.locator("#key-words")).to_have_text("The server says: a key is needed.")
            field = page.get_by_label("Key", exact=True)
            expect(field).to_be_focused()
            field.fill("eagleray_" + "0" * 43)
            page.get_by_role("button", name="Use it").click()
            expect(page.locator("#key-words")).to_have_text("The server says: this key is not known here.")
            field.fill(key)
            field.press("Enter")
            expect(page.get_by_role("radio")).to_have_count(4)
            expect(page.locator("#key-panel")).to_be_hidden()
            send(page, "hello")
            expect(page.locator("#answer")).to_have_text("HELLO")
            assert key not in page.url
            assert page.evaluate("Object.values(sessionStorage)") == [key]
            assert page.evaluate("localStorage.length + document.cookie.length") == 0
            assert key not in page.locator("#curl").inner_text()
            page.get_by_role("radio", name="langid").check()
            page.get_by_role("textbox", name="Text").fill("bonjour")
            page.get_by_role("button", name="Classify").click()
            expect(page.get_by_role("alert")).to_contain_text("the key one may not")
            page.get_by_role("button", name="Key").click()
            page.get_by_role("button", name="Forget it").click()
            expect(page.locator("#key-words")).to_have_text("The server says: a key is needed.")


def test_it_is_used_with_the_keyboard_alone_and_every_control_has_a_name(page: Page) -> None:
    expect(page.get_by_role("radio", name="en-fr")).to_be_checked()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the model")).to_be_focused()
    page.get_by_role("radio", name="en-fr").focus()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("radio", name="langid")).to_be_checked()
    page.keyboard.press("ArrowUp")
    field = page.get_by_label("Text in English")
    field.focus()
    page.keyboard.type("hello")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#answer")).to_have_text("HELLO")
    nameless = page.evaluate(
        """[...document.querySelectorAll('input, textarea, button')].filter((each) =>
             !(each.labels?.length || each.textContent.trim() || each.getAttribute('aria-label')))
           .map((each) => each.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("width, height", VIEWS)
def test_it_fits_the_screen_follows_the_scheme_and_moves_only_where_that_is_wanted(
    page: Page, width: int, height: int
) -> None:
    page.set_viewport_size({"width": width, "height": height})
    for name in ("digits", "own", "langid", "en-fr"):
        page.get_by_role("radio", name=name).check()
        expect(page.get_by_role("heading", name=name)).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    page.get_by_label("Text in English").fill("hello")
    for button in ("Translate", "Key"):
        box = page.get_by_role("button", name=button).bounding_box()
        assert box is not None and box["height"] >= 32 and box["x"] + box["width"] <= width
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(243, 246, 250)", "rgb(13, 20, 28)"]
    motion = "getComputedStyle(document.querySelector('#answer'), '::after').animationName"
    page.locator("#answer").evaluate("each => each.setAttribute('aria-busy', 'true')")
    assert page.evaluate(motion) == "breathe"
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(motion) == "none"
