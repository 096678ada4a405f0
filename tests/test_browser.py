"""The report in a real browser: Chromium, headless. Where there is none the tests are skipped: `make browser`."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from re2tal_jax.evaluation import match_detections
from re2tal_jax.inference.diagnosis import KINDS, error_kinds
from re2tal_jax.inference.html_report import write_html_report
from tests.report_files import CLASSES, MARKUP, SECONDS, ground_truth, predictions, write_clip, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser ({', '.join(BROWSERS)}) on the PATH: `make browser` installs Chromium by apt")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    clip = write_clip(folder / "clip.mp4")
    return write_report(folder / "report.html", {"first": clip, "second": clip})


@pytest.fixture
def open_page(browser):
    """Open a file; what the page logs, throws or asks of the network fails the test."""
    contexts, faults = [], []

    def open_page(path: Path, viewport=DESKTOP, **options):
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: faults.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("request", lambda r: r.url.startswith(("file:", "blob:")) or faults.append(f"request: {r.url}"))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def shown(page):
    """The scores of the detections in the table."""
    return page.locator("#tables table").last.locator("tbody td:nth-child(3)").all_inner_texts()


def until(page, expression):
    """Wait for an expression to be true; Playwright's own waiting needs eval, which the page's policy forbids."""
    deadline = time.monotonic() + 30
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"never true: {expression}"
        time.sleep(0.02)


def until_shown(page, count):
    until(page, f"document.querySelectorAll('.found-lane .segment').length == {count}")


def set_threshold(page, value):
    page.fill("#threshold-number", str(value))
    for _ in range(2):  # the page draws in the next frame
        page.evaluate("() => new Promise(requestAnimationFrame)")


def current_time(page):
    return page.evaluate("document.querySelector('video').currentTime")


def wait_for_video(page):
    until(page, "document.querySelector('video')?.readyState >= 1")


@pytest.fixture
def page(report, open_page):
    """The report, at a threshold that four of the six detections of its first video reach."""
    page = open_page(report)
    set_threshold(page, 0.15)
    return page


def test_the_page_opens_with_its_videos_and_what_was_found(page):
    assert page.locator("h1").inner_text() == f"Report {MARKUP}" == page.title()
    assert page.locator("#list li .id").all_text_contents() == ["first", "second", "third"]
    assert page.locator("#list li .counts").first.text_content() == "4 shown · 2/3 found · 2 false"
    assert page.locator("#name").inner_text() == "first"
    assert page.locator(".truth-lane .segment").count() == 3
    assert page.locator(".truth-lane .missed").count() == 1
    wait_for_video(page)
    assert page.evaluate("document.querySelector('video').duration") == pytest.approx(SECONDS, abs=0.1)


def test_the_slider_changes_what_is_shown(page):
    assert shown(page) == ["0.900", "0.800", "0.700", "0.200"]
    page.focus("#threshold")
    page.keyboard.press("Home")
    until_shown(page, 6)
    assert len(shown(page)) == 6
    page.keyboard.press("End")
    until_shown(page, 1)
    assert shown(page) == ["0.900"]
    assert page.locator(".truth-lane .missed").count() == 2  # also the one that 0.8 found
    page.click("#threshold-reset")
    until_shown(page, 6)  # two for each of the four segments would be eight


def test_opacity_is_the_score(page):
    opacity = "s => s.map(x => Number(getComputedStyle(x).getPropertyValue('--o')))"
    found = page.locator(".found-lane .segment").evaluate_all(opacity)
    np.testing.assert_allclose(found, 0.15 + 0.85 * np.array([0.9, 0.8, 0.7, 0.2]) / 0.9)


def test_a_click_on_a_segment_or_on_the_timeline_seeks_the_video(page):
    wait_for_video(page)
    page.locator(".found-lane .segment").first.click()
    until(page, "Math.abs(document.querySelector('video').currentTime - 2.1) < 0.01")
    until(page, "!document.querySelector('video').seeking && document.querySelector('video').readyState >= 2")
    box = page.locator(".truth-lane .lane-body").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.75, box["y"] + box["height"] / 2)
    assert current_time(page) == pytest.approx(0.75 * SECONDS, abs=0.02)
    page.locator("#tables table").first.get_by_role("button").nth(2).click()
    assert current_time(page) == pytest.approx(5.0, abs=0.01)
    at = page.evaluate("document.querySelector('#timeline').style.getPropertyValue('--at')")
    assert float(at.removesuffix("%")) == pytest.approx(100 * 5 / 6, abs=0.1)


def test_hovering_tells_class_time_score_and_verdict(page):
    page.locator(".found-lane .segment").nth(2).hover()
    tip = page.locator("#tip").inner_text()
    assert CLASSES[3] in tip
    assert "0:02.00–0:03.80" in tip
    assert "score 0.700" in tip
    assert f"wrong label, tIoU 0.90 with {CLASSES[1]}" in tip


def test_the_class_filter_shows_only_what_is_chosen(page):
    chips = page.locator(".chip")
    assert chips.all_inner_texts() == sorted(CLASSES)
    chip = page.get_by_role("button", name=CLASSES[0], exact=True)
    chip.click()
    until_shown(page, 1)
    assert chip.get_attribute("aria-pressed") == "true"
    assert page.locator(".truth-lane .segment").count() == 1
    assert page.locator("#list li .id").all_text_contents() == ["first", "second"]  # the third has none of it
    page.click("#class-clear")
    until(page, "document.querySelectorAll('#list li').length == 3")
    assert page.locator(".found-lane .segment").count() == 4


def test_the_list_is_searched_and_sorted(page):
    page.select_option("#sort", "missed")
    assert page.locator("#list li .id").all_text_contents() == ["first", "second", "third"]
    page.fill("#search", "SEC")
    assert page.locator("#list li .id").all_text_contents() == ["second"]
    assert page.locator("#count").inner_text() == "1 of 3 videos"


def test_only_the_open_video_has_segments_and_a_player(page):
    page.locator("#list li", has_text="second").click()
    assert page.locator(".segment:not(#legend *)").count() == 2
    assert page.locator("video").count() == 1
    wait_for_video(page)
    assert page.evaluate("document.querySelector('video').src").startswith("blob:")
    page.locator("#list li", has_text="third").click()
    assert page.locator("video").count() == 0
    assert page.locator("#note").inner_text() == "There is no file of this video."
    assert page.locator(".segment:not(#legend *)").count() == 0


def test_keys_reach_everything(page):
    wait_for_video(page)
    page.focus("#timeline")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Shift+ArrowRight")
    assert current_time(page) == pytest.approx(6.0, abs=0.05)
    page.keyboard.press("Home")
    assert current_time(page) == 0
    page.keyboard.press("Space")
    until(page, "document.querySelector('video').currentTime > 0.05")
    page.keyboard.press("Space")
    assert page.evaluate("document.querySelector('video').paused")
    page.focus("#list")
    page.keyboard.press("ArrowDown")
    assert page.locator("#name").inner_text() == "second"
    assert page.locator("#list [aria-selected=true] .id").text_content() == "second"
    page.keyboard.press("End")
    assert page.locator("#name").inner_text() == "third"
    page.keyboard.press("Home")
    assert page.locator("#name").inner_text() == "first"
    page.focus("#tab-videos")
    page.keyboard.press("ArrowRight")
    assert page.locator("#panel-evaluation").is_visible()


def test_the_tab_key_visits_every_control_and_shows_where_it_is(report, open_page):
    page = open_page(report)
    visited = []
    for _ in range(60):
        page.keyboard.press("Tab")
        name, outline = page.evaluate("""() => {
            const e = document.activeElement;
            return [e.id || e.className || e.tagName, getComputedStyle(e).outlineStyle];
        }""")
        if name == "BODY":
            break
        assert outline != "none" or name == "VIDEO", f"{name} does not show its focus"  # the browser's own buttons
        visited.append(name)
    wanted = [
        "tab-videos",
        "threshold",
        "threshold-number",
        "threshold-reset",
        "tiou",
        "chip",
        "search",
        "sort",
        "list",
    ]
    wanted += ["timeline", "jump"]
    assert [name for name in dict.fromkeys(visited) if name in wanted] == wanted


def test_every_control_has_a_name(page):
    controls = "button, input, select, [role=slider], [role=listbox], [role=img], video"
    nameless = f"""() => [...document.querySelectorAll("{controls}")]
        .filter((e) => !(e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim()))
        .map((e) => e.outerHTML)"""
    assert page.evaluate(nameless) == []
    page.click("#tab-evaluation")
    assert page.evaluate(nameless) == []


def test_the_evaluation_shows_its_tables_and_curves(page):
    page.click("#tab-evaluation")
    panel = page.locator("#panel-evaluation")
    assert panel.locator("h2").all_inner_texts() == [
        "Mean average precision", "Precision and recall", "Errors", "Lengths", "Classes"
    ]  # fmt: skip
    first = panel.locator("table").first.locator("tbody tr").first.inner_text().split("\t")
    assert first[0] == "mAP"
    assert len(first) == 5
    assert panel.locator("svg path").count() == 1 + 3 + 1  # mAP, a curve for each class with segments, their mean
    page.select_option("#curve-class", label=CLASSES[1])
    assert panel.locator("svg .chosen").count() == 1


@pytest.mark.parametrize("tab", ["videos", "evaluation"])
def test_nothing_is_wider_than_a_phone(report, open_page, tab):
    page = open_page(report, PHONE, has_touch=True, is_mobile=True)
    page.click(f"#tab-{tab}")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_markup_in_names_is_text(page):
    assert page.locator("img").count() == 0
    assert page.evaluate("typeof hacked") == "undefined"
    set_threshold(page, 0)
    names = page.locator("#tables table").last.locator("tbody .class-name").all_inner_texts()
    assert names == [CLASSES[c] for c in (1, 0, 3, 2, 1, 0)]


def test_a_linked_video_plays_from_beside_the_page(tmp_path, open_page):
    name = os.fsdecode(b"caf\xe9 #1 %.mp4")
    write_clip(tmp_path / name)
    options = {"videos": {"v": tmp_path / name}, "durations_sec": {"v": SECONDS}, "title": "t", "embed_mib": 0}
    write_html_report(tmp_path / "report.html", predictions({"v": []}), **options)
    page = open_page(tmp_path / "report.html")
    wait_for_video(page)
    assert page.evaluate("document.querySelector('video').duration") == pytest.approx(SECONDS, abs=0.1)


def test_an_empty_report_opens(tmp_path, open_page):
    write_html_report(tmp_path / "report.html", {"results": {}}, videos={}, durations_sec={}, title="t")
    assert open_page(tmp_path / "report.html").locator("#count").inner_text() == "No videos."


def test_verdicts_are_those_of_the_evaluation(tmp_path, open_page):
    rng = np.random.default_rng(3)
    truth = {f"v{v}": [(s, s + 1.5, int(rng.integers(3))) for s in rng.uniform(0, 4, 4)] for v in range(3)}
    found = {v: [(s, s + 1.5, int(rng.integers(3)), rng.uniform(0.1, 1)) for s in rng.uniform(0, 4, 25)] for v in truth}
    sources = ground_truth(truth), predictions(found)
    matching = match_detections(*sources, subset="validation", tiou_thresholds=(0.5,))
    expected = {}
    for label, video, score, kind in zip(
        matching.found.label, matching.found.video, matching.found.scores, error_kinds(matching)[0], strict=True
    ):
        name = matching.found.classes[label]
        expected.setdefault(matching.found.video_ids[video], []).append((-score, name, KINDS[kind]))
    options = {"videos": {}, "durations_sec": {}, "title": "t", "ground_truth": sources[0]}
    write_html_report(tmp_path / "report.html", sources[1], **options)
    page = open_page(tmp_path / "report.html")
    set_threshold(page, 0)
    for video_id, rows in expected.items():
        page.locator("#list li", has_text=video_id).click()
        verdicts = page.locator("#tables table").last.locator("tbody .verdict").all_inner_texts()
        kinds = ["true positive" if "✓" in text else text.split(": ")[1].split(",")[0] for text in verdicts]
        assert kinds == [kind for _, _, kind in sorted(rows)]
        assert len(set(kinds)) > 3


def test_hundreds_of_videos_make_few_elements(tmp_path, open_page):
    rng = np.random.default_rng(0)
    found = {f"v{v:03d}": [(s, s + 1, 0, rng.uniform()) for s in rng.uniform(0, 60, 100)] for v in range(600)}
    truth = ground_truth({v: [(10 * i, 10 * i + 1, 0) for i in range(4)] for v in found})
    options = {"videos": {}, "durations_sec": {}, "title": "t", "ground_truth": truth}
    write_html_report(tmp_path / "report.html", predictions(found), **options)
    page = open_page(tmp_path / "report.html")
    set_threshold(page, 0.5)
    page.focus("#list")
    page.keyboard.press("End")
    assert page.locator("#name").inner_text() == "v599"
    assert page.locator("#list li[aria-selected=true]").is_visible()
    assert page.evaluate("document.querySelectorAll('*').length") < 600 * 3 + 1500


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(report, open_page, scheme):
    page = open_page(report, color_scheme=scheme)
    contrast = """(selector) => {
        const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const lum = (colour) => colour.match(/[\\d.]+/g).slice(0, 3)
            .reduce((sum, v, i) => sum + linear(v / 255) * [0.2126, 0.7152, 0.0722][i], 0);
        const e = document.querySelector(selector);
        const [a, b] = [lum(getComputedStyle(e).color), lum(getComputedStyle(e.closest(".card")).backgroundColor)];
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }"""
    for selector in ("#name", "#facts", ".verdict.right", ".verdict.wrong", ".jump"):
        assert page.evaluate(contrast, selector) >= 4.5, selector


def test_the_timeline_zooms_and_stays_inside_the_page(page):
    width = page.locator("#timeline").bounding_box()["width"]
    page.click("#zoom-in")
    page.click("#zoom-in")
    assert page.locator("#timeline").bounding_box()["width"] == pytest.approx(4 * width, rel=0.01)
    page.focus("#timeline")
    page.keyboard.press("End")
    assert page.evaluate("document.querySelector('#window').scrollLeft") > 2 * width  # the playhead is in view
    assert page.evaluate("document.documentElement.scrollWidth") == DESKTOP["width"]
    page.locator("#list li", has_text="second").click()
    assert page.locator("#timeline").bounding_box()["width"] == pytest.approx(width, rel=0.01)
