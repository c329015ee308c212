"""The page in a real browser: headless Chromium, Debian's package, without a network."""

import io
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image

from dit_accel.eval.results.store import write_results
from dit_accel.eval.view.report import report

from .example_report import example_results, write_media

PROMPTS = (
    '"><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">',
    "\N{RIGHT-TO-LEFT OVERRIDE}\N{HEBREW LETTER SHIN}\N{HEBREW LETTER LAMED} " + "long" * 500,
)
SHOWN = ("Dense", "Dense, 12 steps", "SLA balanced", "RAS + SLA")


@pytest.fixture(scope="module")
def browser():
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        why = "needs Chromium: apt-get install chromium, as `make test` does where it may"
        (pytest.fail if "CI" in os.environ else pytest.skip)(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips of two samples with hostile prompts, in rows with hostile names."""
    folder = tmp_path_factory.mktemp("report")
    results = example_results()
    results["title"] = "<b>costs</b> " + "unbroken" * 20
    results["rows"][5]["name"] = "Sea<Cache> " + "x" * 60
    results["samples"] = write_media(folder, results, len(PROMPTS), frames=33, size=32, names=SHOWN)
    for sample, prompt in zip(results["samples"], PROMPTS, strict=True):
        sample["prompt"] = prompt
    write_results(folder, results)
    report(folder)
    return folder


@pytest.fixture
def open_page(browser, folder):
    """Opens the page offline; errors and requests are collected and must be none in the end."""
    contexts, trouble = [], []

    def open_page(width=1280, file="report.html", **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        context.set_offline(True)
        page = context.new_page()
        page.set_default_timeout(60_000)
        address = (folder / file).as_uri()
        page.on("console", lambda message: trouble.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((address, "blob:", "data:"))
                or trouble.append(f"request: {request.url}")
            ),
        )
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("window.hacked === undefined")
        context.close()
    assert trouble == []


def wait_until(condition, seconds=30.0):
    """Playwright's own waiting is evaluated in the page, which its policy forbids."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def names(page):
    return page.evaluate(
        "[...document.querySelectorAll('#methods tbody tr bdi')].map(x => x.textContent)"
    )


def times(page):
    return page.evaluate("[...document.querySelectorAll('video')].map(x => x.currentTime)")


def loaded(page):
    return page.evaluate(
        "[...document.querySelectorAll('video')].every(x => x.readyState === 4 && !x.error)"
        " && document.querySelectorAll('video').length > 0"
    )


def test_the_table_sorts_by_mouse_and_by_keyboard(open_page):
    page = open_page()
    before = names(page)
    heading, button = "th[data-key=psnr]", "th[data-key=psnr] button"
    page.click(button)
    assert page.get_attribute(heading, "aria-sort") == "descending"
    best_first = names(page)
    assert best_first[:3] == ["SLA, every key", "SLA balanced", "RAS balanced"]
    assert best_first[-2] == "Dense"  # the reference has no PSNR
    assert best_first[-1].startswith("Sea<Cache>")  # not available: always last

    page.keyboard.press("Tab")  # on to the next heading
    assert page.evaluate("document.activeElement.closest('th').dataset.key") == "ssim"
    page.keyboard.press("Enter")
    page.keyboard.press("Space")
    assert page.get_attribute(heading, "aria-sort") == "none"
    assert page.get_attribute("th[data-key=ssim]", "aria-sort") == "ascending"
    assert names(page)[0] == "Dense, 12 steps"
    assert "SSIM" in page.inner_text("#sorted")
    assert sorted(names(page)) == sorted(before)

    page.click("th.name button")
    assert names(page)[0] == "Dense"
    for column in page.query_selector_all("#methods thead button"):  # every column sorts
        column.click()
        assert column.evaluate("x => x.closest('th').ariaSort") in ("ascending", "descending")


def test_clips_load_play_in_step_and_obey_keys(open_page):
    page = open_page()
    wait_until(lambda: loaded(page))
    assert page.locator("video").count() == 4
    page.focus("#play")
    page.keyboard.press("Enter")
    wait_until(lambda: min(times(page)) > 0.3)
    now = times(page)
    assert max(now) - min(now) < 0.15
    assert page.inner_text("#play") == "Pause"

    page.keyboard.press("k")
    assert page.inner_text("#play") == "Play"
    stopped = times(page)
    time.sleep(0.3)
    assert times(page) == stopped

    page.focus("#scrub")
    page.keyboard.press("Home")
    wait_until(lambda: max(times(page)) < 0.05)
    page.keyboard.press("ArrowRight")
    page.keyboard.press(".")
    wait_until(lambda: all(2 / 16 <= x < 3 / 16 for x in times(page)))
    assert page.inner_text("#clock").startswith("0.13 of 2.0")

    page.select_option("#speed", "2")  # and round again after the end
    page.click("#play")
    wait_until(lambda: max(times(page)) > 1.5)
    wait_until(lambda: max(times(page)) < 1.0)
    assert page.inner_text("#play") == "Pause"


def test_samples_and_methods_are_chosen(open_page):
    page = open_page()
    wait_until(lambda: loaded(page))
    assert page.inner_text("#prompt") == PROMPTS[0]
    page.select_option("#sample", "1")
    wait_until(lambda: loaded(page))
    assert page.text_content("#prompt") == PROMPTS[1]
    shown = page.locator("#stage figcaption bdi")
    assert shown.all_text_contents() == list(SHOWN)
    page.uncheck("#chosen input >> nth=1")
    page.focus("#chosen input >> nth=3")
    page.keyboard.press("Space")
    assert shown.all_text_contents() == ["Dense", "SLA balanced"]
    wait_until(lambda: loaded(page))
    pixels = page.locator("video").first.evaluate(
        """video => {
            const canvas = document.createElement("canvas");
            canvas.width = canvas.height = 32;
            const brush = canvas.getContext("2d");
            brush.drawImage(video, 0, 0, 32, 32);
            return [...brush.getImageData(0, 0, 32, 32).data];
        }"""
    )
    assert np.std(np.reshape(pixels, (32, 32, 4))[..., :3], axis=(0, 1)).max() > 10  # a picture


def test_the_plot_changes_with_the_metric_and_the_seconds(open_page):
    page = open_page()
    drawn = page.locator(".plot img:visible")
    assert drawn.count() == 1
    assert drawn.get_attribute("alt").startswith("PSNR against total seconds")
    first = drawn.get_attribute("src")
    page.select_option("#metric", "judge")
    page.select_option("#phase", "denoise")
    assert drawn.count() == 1
    assert drawn.get_attribute("alt").startswith("Judge against denoise seconds")
    assert drawn.get_attribute("src") != first
    assert drawn.evaluate("x => x.complete && x.naturalWidth > 500")
    assert "RAS balanced" in page.inner_text(".view:not([hidden]) .legend")
    assert "RAS balanced" in page.inner_text(".view:not([hidden]) .verdicts")


def test_the_page_is_seen_in_both_schemes(open_page):
    brightness = []
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        wait_until(lambda page=page: loaded(page))
        picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
        grey = np.asarray(picture.convert("L"), float)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 200
        assert grey.std() > 10
        brightness.append(np.median(grey))
    assert brightness[0] > 230
    assert brightness[1] < 50


def test_a_telephone_scrolls_down_only(open_page):
    page = open_page(width=400)
    wait_until(lambda: loaded(page))
    page.evaluate("document.querySelectorAll('details').forEach(x => { x.open = true; })")
    page.select_option("#sample", "1")
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    table = page.locator(".scroll").first  # which scrolls by itself
    assert table.evaluate("x => x.scrollWidth > x.clientWidth && x.tabIndex === 0")
    assert page.locator(".plot:visible").evaluate("x => x.scrollWidth > x.clientWidth")


def test_stills_are_pictures_without_a_player(open_page, folder):
    results = example_results()
    (folder / "stills").mkdir()
    results["samples"] = write_media(folder / "stills", results, 1, "png", names=SHOWN)
    write_results(folder / "stills", results)
    report(folder / "stills")
    page = open_page(file="stills/report.html")
    widths = "[...document.querySelectorAll('#stage img')].map(x => x.naturalWidth)"
    wait_until(lambda: page.evaluate(widths) == [64] * 4)
    assert not page.is_visible("#transport")
