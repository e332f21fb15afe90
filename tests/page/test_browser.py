"""The page in a headless Chromium: errors, requests, charts, themes, a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.page.test_page import changed, red
from varlen_vision.compare.page import check_folder, write_report
from varlen_vision.compare.results import Comparison

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("no Chromium is installed: apt-get install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

# As root there is no sandbox, and a browser on its own looks for updates.
OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}

# Pairs of labels of one drawing whose boxes overlap, and labels that stick out of the window.
OVERLAPS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll("svg")) {
    const texts = [...svg.querySelectorAll("text")]
      .map(one => [one.textContent, one.getBoundingClientRect()]);
    texts.forEach(([words, box], at) => {
      const outside = box.left < -1 || box.right > innerWidth + 1;
      if (box.width && outside) found.push(words + " sticks out");
      for (const [other, near] of texts.slice(0, at)) {
        const across = Math.min(box.right, near.right) - Math.max(box.left, near.left);
        const down = Math.min(box.bottom, near.bottom) - Math.max(box.top, near.top);
        if (across > 1 && down > 4) found.push(words + " on " + other);
      }
    });
  }
  return found;
}"""
# Sizes of all text as it is drawn, in pixels of the screen.
SIZES = """() => [...document.querySelectorAll("svg text")].map(text => {
  const svg = text.ownerSVGElement, shown = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  return shown ? parseFloat(getComputedStyle(text).fontSize) * shown : 99;
})"""


@pytest.fixture(scope="module")
def report(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    check_folder(folder)
    return write_report(comparison, folder).as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, report: str) -> Iterator[Any]:
    """Open the page with options of a browser context; every complaint and request is judged at the end."""
    contexts, complaints, requests = [], [], []

    def open_page(**options: Any) -> Any:
        context = browser.new_context(**{"viewport": DESKTOP, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(report)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints
    assert requests and set(requests) == {report}


def background(page: Any) -> str:
    colour: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return colour


def test_the_charts_are_drawn(opened: Any) -> None:
    page = opened()
    for section, least in (("growth", 2), ("pattern", 2), ("errors", 1)):
        boxes = [svg.bounding_box() for svg in page.query_selector_all(f"#{section} svg") if svg.is_visible()]
        assert len(boxes) >= least
        assert all(box["width"] > 200 and box["height"] > 150 for box in boxes)
    assert page.locator("#growth svg .line circle").count() >= 3
    bars = [bar.bounding_box() for bar in page.query_selector_all("#breakdown .fill") if bar.is_visible()]
    assert len(bars) > 10 and max(box["width"] for box in bars) > 100


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_labels_are_legible(opened: Any, viewport: dict[str, int]) -> None:
    legible(opened(viewport=viewport))


def test_labels_are_legible_where_paths_failed(browser: Any, comparison: Comparison, folder: Path) -> None:
    broken = comparison
    for path in ("varlen[auto]", "varlen[sdpa_segments]"):
        broken = changed(broken, path, red)
    check_folder(folder)
    context = browser.new_context(viewport=PHONE)
    page = context.new_page()
    page.goto(write_report(broken, folder).as_uri())
    legible(page)
    names = page.locator("#errors > .charts svg .name").all_text_contents()
    assert sorted(names) == ["allowed", "mask", "sdpa", "varlen failed"]
    struck = page.locator("tr.red s").first
    assert "line-through" in struck.evaluate("node => getComputedStyle(node).textDecorationLine")
    context.close()


def legible(page: Any) -> None:
    """No labels overlap or stick out, and none is small."""
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate(OVERLAPS) == []
    # Powers are set smaller; they are no text of their own.
    assert min(page.evaluate(SIZES)) >= 10.5


def test_nothing_scrolls_sideways_on_a_phone(opened: Any) -> None:
    page = opened(viewport=PHONE)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    inside = "[...document.querySelectorAll('.scroll')].some(box => box.scrollWidth > box.clientWidth)"
    assert page.evaluate(inside), "wide tables scroll in their own box"


def test_the_theme_follows_the_system_and_the_button(opened: Any) -> None:
    light, dark = background(opened()), background(opened(color_scheme="dark"))
    assert light != dark
    page = opened()
    button = page.locator("#theme")
    assert button.inner_text() == "Dark"
    button.click()
    assert background(page) == dark and button.inner_text() == "Light"
    page.reload()
    assert background(page) == dark, "the choice is kept"
    button.click()
    assert background(page) == light
    page.emulate_media(media="print", color_scheme="dark")
    assert background(page) == light and not button.is_visible()


def test_it_can_be_read_without_javascript(opened: Any) -> None:
    page = opened(java_script_enabled=False, color_scheme="dark")
    assert page.locator("#paths table").first.is_visible()
    assert "dense mask" in page.locator("h1").inner_text()
    assert page.locator("#growth svg").first.is_visible()
    assert not page.locator("#theme").is_visible()


def test_text_of_charts_can_be_selected(opened: Any) -> None:
    page = opened()
    select = """() => {
      getSelection().selectAllChildren(document.querySelector("#growth svg"));
      return getSelection().toString();
    }"""
    assert "patches in the batch" in page.evaluate(select)


def test_the_embedded_data_can_be_saved(opened: Any, comparison: Comparison, tmp_path: Path) -> None:
    page = opened(accept_downloads=True)
    with page.expect_download() as waiting:
        page.locator("#save").click()
    waiting.value.save_as(tmp_path / "saved.json")
    assert waiting.value.suggested_filename == "comparison.json"
    assert json.loads((tmp_path / "saved.json").read_text()) == json.loads(comparison.to_json())
