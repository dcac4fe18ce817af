"""The report in real headless Chromium: drawn, quiet, alone, and usable with mouse and keyboard."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from greenprune.cli import main
from greenprune.report.contents import build_report
from greenprune.report.page import render_page

sys.path.insert(0, str(Path(__file__).parent))
from recording import record_run, stop_before

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        missing = "no Chromium with its driver: tests/report/install-chromium.sh"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for seed in (0, 1):
        record_run(folder / f"dense-{seed}", seed=seed, gated=False)
        record_run(folder / f"gated-{seed}", seed=seed)
    stop_before(folder / "live", record_run(folder / "live", seed=2), 20)
    path = folder / "report.html"
    path.write_text(render_page(build_report([folder]), "1"))
    return path


def open_page(browser: webdriver.Chrome, page: Path, size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> None:
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())
    WebDriverWait(browser, 30).until(
        lambda b: b.execute_script("return document.documentElement.dataset.ready") == "true"
    )


def visible_runs(browser: webdriver.Chrome, figure: str) -> set[str]:
    """Runs whose lines a figure draws now."""
    script = (
        "return document.getElementById(arguments[0]).data.filter((t) => t.visible && t.meta && t.meta.run)"
        ".map((t) => t.meta.run)"
    )
    return set(browser.execute_script(script, figure))


def rows(browser: webdriver.Chrome) -> set[str]:
    return {
        str(row.get_attribute("data-run"))
        for row in browser.find_elements(By.CSS_SELECTOR, "tr[data-run]")
        if row.is_displayed()
    }


ALL = {"dense-0", "dense-1", "gated-0", "gated-1", "live"}


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_it_is_drawn_without_an_error_or_a_request(
    browser: webdriver.Chrome, page: Path, size: tuple[int, int], dark: bool
) -> None:
    open_page(browser, page, size, dark=dark)
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == [page.as_uri()]
    for name in ("accuracy", "joules", "flops", "phase", "device"):
        plot = browser.find_element(By.ID, f"t0-{name}")
        assert plot.find_elements(By.CSS_SELECTOR, ".points path, .js-line, .bars path, .trace path"), name
        assert plot.size["width"] > 250
    shown = [m for m in browser.find_elements(By.CSS_SELECTOR, ".map .heatmaplayer image") if m.is_displayed()]
    assert len(shown) == 1
    # Nothing is wider than the window: wide tables scroll by themselves.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= size[0]
    paper, ink = (
        browser.execute_script(f"return getComputedStyle(document.body).{name}")
        for name in ("backgroundColor", "color")
    )
    lightness = [sum(map(int, colour[4:-1].split(","))) for colour in (paper, ink)]
    assert (lightness[0] < lightness[1]) == dark
    axis = browser.find_element(By.CSS_SELECTOR, "#t0-joules .xtick text")
    assert axis.value_of_css_property("fill") == ink


def test_a_click_on_a_run_shows_it_alone_and_another_click_all(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    assert visible_runs(browser, "t0-joules") == rows(browser) == ALL
    browser.find_element(By.CSS_SELECTOR, 'button.run[data-run="gated-1"]').click()
    for figure in ("t0-accuracy", "t0-joules", "t0-flops"):
        assert visible_runs(browser, figure) == {"gated-1"}
    assert rows(browser) == {"gated-1"}
    assert "Only gated-1 is shown" in browser.find_element(By.ID, "shown").text
    # Its network is the one that is shown.
    names = [h.text for h in browser.find_elements(By.CSS_SELECTOR, "article > h3") if h.is_displayed()]
    assert names == ["gated-1"]
    browser.find_element(By.CSS_SELECTOR, 'button.run[data-run="gated-1"]').click()
    assert visible_runs(browser, "t0-joules") == rows(browser) == ALL
    assert browser.get_log("browser") == []


def test_groups_are_chosen_with_the_keyboard(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    body = browser.find_element(By.TAG_NAME, "body")
    body.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to the figures"
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert browser.switch_to.active_element.get_attribute("type") == "checkbox"
    browser.switch_to.active_element.send_keys(Keys.SPACE)  # the dense group
    assert visible_runs(browser, "t0-joules") == {"gated-0", "gated-1", "live"}
    assert "3 of 5 runs are shown" in browser.find_element(By.ID, "shown").text
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    assert rows(browser) == ALL


def test_another_network_can_be_chosen(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    Select(browser.find_element(By.ID, "network")).select_by_visible_text("dense-0")
    (article,) = [a for a in browser.find_elements(By.TAG_NAME, "article") if a.is_displayed()]
    assert "A dense run: nothing is gated, nothing was removed." in article.text


def test_a_screen_reader_finds_its_way(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page)
    nodes: list[dict[str, Any]] = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node.get("ignored")
    ]
    pictures = [name for role, name in named if role in ("image", "img")]
    assert len(pictures) >= 6
    assert all(pictures)
    assert any("Scatter of accuracy over joules. Means: dense: " in name for name in pictures)
    levels = [int(h.tag_name[1]) for h in browser.find_elements(By.CSS_SELECTOR, "h1,h2,h3,h4,h5") if h.is_displayed()]
    assert levels[0] == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    for table in browser.find_elements(By.TAG_NAME, "table"):
        assert table.find_elements(By.TAG_NAME, "caption")
        assert table.find_elements(By.CSS_SELECTOR, "th[scope=col], th[scope=colgroup]")
    for role in ("checkbox", "combobox", "button"):
        controls = [name for kind, name in named if kind == role]
        assert controls
        assert all(controls)
    assert browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == "en"


def test_it_prints_on_white_without_its_controls(browser: webdriver.Chrome, page: Path) -> None:
    open_page(browser, page, dark=True)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not browser.find_element(By.ID, "show-all").is_displayed()
    assert browser.find_element(By.CSS_SELECTOR, "#t0-joules").is_displayed()
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True, "preferCSSPageSize": True})["data"]
    assert len(printed) > 20_000
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_a_picture_is_drawn_by_the_same_browser(browser: webdriver.Chrome, page: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.png"
    assert main(["report", str(page.parent), "-o", str(output)]) == 0
    content = output.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (3000, 1040)
    assert len(content) > 50_000
