"""Tests the built site in a real browser, from its folder and without a network. Run by `make docs-test`."""

import html.parser
import os
import shutil
import urllib.parse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from playwright.sync_api import sync_playwright

import fcfunc

SITE = Path(__file__).parent / "_build" / "html"
PAGES = sorted(str(page.relative_to(SITE)) for page in SITE.rglob("*.html") if "_static" not in page.parts)
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
LOCAL = ("file:", "data:", "blob:")
PHONE = {"width": 375, "height": 720}
SCREEN = {"width": 1280, "height": 900}


@pytest.fixture(scope="session")
def browser():
    assert CHROMIUM, "chromium expected (Debian's package of this name), or CHROMIUM=path"
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)


@pytest.fixture
def open_page(browser):
    """Opens a page of the site. Fails at the end if there were console errors or requests to other hosts."""
    contexts, faults = [], []

    def open_page(name, **options):
        context = browser.new_context(**({"viewport": SCREEN} | options))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(LOCAL) else faults.append(request.url))
        page.goto(f"file://{SITE / name}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


class Links(html.parser.HTMLParser):
    """The targets of a page's links and images, and its anchors."""

    def __init__(self, text):
        super().__init__()
        self.targets, self.anchors = set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        """Called for each element."""
        values = dict(attrs)
        self.targets |= {values[name] for name in ("href", "src") if values.get(name)}
        self.anchors |= {values[name] for name in ("id", "name") if values.get(name)}


LINKS = {page: Links((SITE / page).read_text()) for page in PAGES}


def test_the_site_was_built():
    assert len(PAGES) > 60


@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_without_an_error_or_a_request(name, open_page):
    page = open_page(name)
    page.wait_for_load_state("load")
    assert page.title()


@pytest.mark.parametrize("name", PAGES)
def test_no_link_of_a_page_is_dead(name):
    dead = []
    for target in LINKS[name].targets:
        parts = urllib.parse.urlparse(target)
        if parts.scheme or (name in ("search.html", "genindex.html") and not parts.path):
            continue
        path = (SITE / name).parent / urllib.parse.unquote(parts.path) if parts.path else SITE / name
        path = path.resolve()
        anchors = LINKS[str(path.relative_to(SITE))].anchors if path.suffix == ".html" and path.exists() else set()
        if not path.exists() or (parts.fragment and path.suffix == ".html" and parts.fragment not in anchors):
            dead.append(target)
    assert dead == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone(name, open_page):
    page = open_page(name, viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.parametrize(
    ("words", "title"),
    [
        ("weight decay", "weight decay on weights only"),
        ("can't apply forward-mode autodiff", "second derivatives and forward mode"),
    ],
)
def test_the_search_finds(words, title, open_page):
    page = open_page(f"search.html?q={urllib.parse.quote(words)}")
    page.wait_for_selector("#search-results li a", timeout=20_000)
    assert title in page.inner_text("#search-results").lower()


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_the_site_follows_the_theme_of_the_system(scheme, dark, open_page):
    page = open_page("index.html", color_scheme=scheme)
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    channels = [int(value) for value in color.strip("rgba()").split(",")[:3]]
    assert (sum(channels) < 3 * 128) == dark


def test_formulas_are_rendered(open_page):
    page = open_page("background/derivations.html")
    page.wait_for_selector("mjx-container", timeout=20_000)
    assert page.locator("mjx-merror").count() == 0


THREE = [
    (0.3, 0.15),
    (0.6, 0.12),
    (0.68, 0.28),
    (0.6, 0.43),
    (0.44, 0.48),
    (0.62, 0.52),
    (0.7, 0.7),
    (0.58, 0.87),
    (0.3, 0.87),
]


def draw(page, points):
    """Draws a stroke with the mouse."""
    box = page.locator("#digit-canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=6)
    page.mouse.up()


@pytest.mark.parametrize("viewport", [SCREEN, PHONE])
def test_a_drawn_three_is_a_three(viewport, open_page):
    page = open_page("draw-a-digit.html", viewport=viewport)
    draw(page, THREE)
    assert page.inner_text("#digit-answer").startswith("3,")


def test_a_finger_draws(open_page):
    page = open_page("draw-a-digit.html", viewport=PHONE, has_touch=True)
    client = page.context.new_cdp_session(page)
    box = page.locator("#digit-canvas").bounding_box()
    for i, (x, y) in enumerate(THREE):
        point = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
        kind = "touchMove" if i else "touchStart"
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
    client.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert page.inner_text("#digit-answer").startswith("3,")


def test_the_keyboard_draws_and_clears(open_page):
    page = open_page("draw-a-digit.html")
    page.focus("#digit-canvas")
    for key in ["ArrowUp"] * 8 + [" "] + ["ArrowDown"] * 15 + [" "]:
        page.keyboard.press(key)
    assert page.inner_text("#digit-answer").startswith("1,")
    page.keyboard.press("Escape")
    assert page.inner_text("#digit-answer") == "Draw a digit."


def test_all_ten_examples_are_recognized(open_page):
    page = open_page("draw-a-digit.html")
    answers = []
    for _ in range(10):
        page.click("#digit-example")
        answers.append(int(page.inner_text("#digit-answer")[0]))
    assert sorted(answers) == list(range(10))


def test_outputs_and_gradients_in_the_browser_are_those_of_jax(open_page):
    page = open_page("draw-a-digit.html")
    x = np.random.default_rng(0).uniform(0, 1, 64).astype(np.float32)
    ours = page.evaluate("x => digit.classify(DIGIT_PARAMS, x)", x.tolist())
    params = page.evaluate("DIGIT_PARAMS")
    params = [{name: jnp.asarray(a, jnp.float32) for name, a in layer.items()} for layer in params]
    net = fcfunc.mlp([64, 256, 10])
    logits = net.apply(params, x[None])[0]
    gradient = jax.grad(lambda x: net.apply(params, x[None])[0, jnp.argmax(logits)])(x)
    np.testing.assert_allclose(ours["logits"], logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours["probabilities"], jax.nn.softmax(logits), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours["gradient"], gradient, rtol=1e-4, atol=1e-5)
