"""Report and dashboard in a real browser: nothing on the console, nothing beside the page, usable by keyboard.

Needs Chromium and its driver (Debian: apt-get install chromium chromium-driver); skipped where they are not installed,
except under ``CI=true`` with ``SKIPPLAN_TEST_BROWSER=1``.
"""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from report_builders import finished_job, record_many
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from optimizer.dashboard.app import create_app
from optimizer.reports.html import write_report
from storage.database import Database
from storage.queue import jobs, leases

pytestmark = pytest.mark.slow

WIDTHS = (1280, 380)
SECTIONS = ("front", "plans", "redundancy", "theory", "progress", "latency", "provenance")


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        reason = "no Chromium with its driver found (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("SKIPPLAN_TEST_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address of an application that a thread serves."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(filled: Database) -> Iterator[str]:
    """The dashboard over the filled database."""
    with served(create_app(filled)) as where:
        yield where


def show(browser: webdriver.Chrome, url: str, width: int, *, dark: bool = False) -> None:
    size = {"width": width, "height": 850, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    theme = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", theme)
    browser.get_log("browser")
    browser.get(url)


def until(browser: webdriver.Chrome, condition: Callable[[webdriver.Chrome], Any], message: str) -> None:
    WebDriverWait(browser, 60).until(condition, message)


def draw_everything(browser: webdriver.Chrome) -> None:
    """Scroll until every chart is drawn."""
    for place in browser.find_elements(By.CLASS_NAME, "chart"):
        browser.execute_script("arguments[0].scrollIntoView()", place)
        until(browser, lambda _, place=place: place.get_attribute("data-drawn") == "yes", "a chart was not drawn")


def complaints(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def overflow(browser: webdriver.Chrome) -> int:
    return int(browser.execute_script("const e = document.documentElement; return e.scrollWidth - e.clientWidth"))


@pytest.fixture(scope="module")
def report_file(filled: Database, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(write_report(filled, 1))
    return path


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
def test_report_draws_every_chart(browser: webdriver.Chrome, report_file: Path, width: int, dark: bool) -> None:
    show(browser, report_file.as_uri(), width, dark=dark)
    draw_everything(browser)
    assert complaints(browser) == []
    assert overflow(browser) <= 0
    for section in SECTIONS:
        assert browser.find_element(By.ID, section).is_displayed()
    # No axis label or tick may be cut off at the edge of its chart.
    cut = browser.execute_script("""
        return [...document.querySelectorAll('.chart')].flatMap((place) => {
          const box = place.getBoundingClientRect();
          return [...place.querySelectorAll('svg text')].filter((text) => {
            const own = text.getBoundingClientRect();
            return own.width && (own.left < box.left - 1 || own.right > box.right + 1 || own.bottom > box.bottom + 1);
          }).map((text) => `${place.id}: ${text.textContent}`);
        });""")
    assert cut == []


def test_pointing_at_a_plan_shows_its_strip(browser: webdriver.Chrome, report_file: Path) -> None:
    show(browser, report_file.as_uri(), 1280)
    draw_everything(browser)
    browser.execute_script("document.getElementById('chart-front').scrollIntoView({block: 'center'})")
    points = browser.find_elements(By.CSS_SELECTOR, "#chart-front .scatterlayer .point")
    letters: list[object] = []
    for candidate in points:
        ActionChains(browser).move_to_element(candidate).perform()
        time.sleep(0.1)
        letters = browser.find_elements(By.CSS_SELECTOR, ".tip .strip i")
        if letters:
            break
    assert len(letters) == 8
    assert browser.find_element(By.CLASS_NAME, "tip").is_displayed()
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not browser.find_element(By.CLASS_NAME, "tip").is_displayed()


def test_theme_is_switched_by_keyboard(browser: webdriver.Chrome, report_file: Path) -> None:
    show(browser, report_file.as_uri(), 1280)
    before = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    button = browser.find_element(By.ID, "theme")
    browser.execute_script("arguments[0].focus()", button)
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != before
    assert button.text == "Light"


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", ["/", "/jobs/1", "/jobs/3", "/plans", "/models", "/docs", "/jobs/1/report", "/login"])
def test_dashboard_pages(browser: webdriver.Chrome, address: str, path: str, width: int) -> None:
    show(browser, address + path, width)
    if path.endswith("report"):
        draw_everything(browser)
    assert complaints(browser) == []
    assert overflow(browser) <= 0


def test_filters_work_by_keyboard_alone(browser: webdriver.Chrome, address: str) -> None:
    show(browser, f"{address}/plans", 1280)
    keys = ActionChains(browser)
    reached: list[str] = []
    for _ in range(40):
        keys.send_keys(Keys.TAB).perform()
        reached.append(
            browser.execute_script("return document.activeElement.name || document.activeElement.textContent")
        )
        if reached[-1] == "min_speedup":
            keys.send_keys("1.5", Keys.ENTER).perform()
            break
    assert reached[0] == "To the content"
    until(browser, lambda here: "min_speedup=1.5" in here.current_url, f"the form was not sent; reached {reached}")
    assert len(browser.find_elements(By.CSS_SELECTOR, "tbody tr")) == 2


def test_progress_moves_without_loading_the_page_again(
    browser: webdriver.Chrome, address: str, filled: Database
) -> None:
    show(browser, f"{address}/", 1280)
    row = browser.find_element(By.CSS_SELECTOR, "[data-job='2']")
    assert "search 37/200" in row.text
    running = jobs.get(filled, 2)
    leases.heartbeat(filled, running, 600, {"stage": "search", "done": 91, "total": 200, "news": ""})
    until(browser, lambda _: "search 91/200" in row.text, "the progress did not move")
    assert complaints(browser) == []


def test_page_of_ten_thousand_evaluations_is_small(
    browser: webdriver.Chrome, tmp_path: Path, sqlite_template: Path
) -> None:
    shutil.copy(sqlite_template, tmp_path / "large.db")
    with Database.open(f"sqlite:///{tmp_path / 'large.db'}") as db:
        job_id = finished_job(db)
        record_many(db, job_id, 10_000)
        page = write_report(db, job_id)
    assert "10,013 plans tried" in page
    assert len(page.encode()) < 8_000_000
    (tmp_path / "large.html").write_text(page)
    show(browser, (tmp_path / "large.html").as_uri(), 1280)
    draw_everything(browser)
    assert complaints(browser) == []


def test_a_job_is_submitted_and_cancelled_from_the_page(browser: webdriver.Chrome, service: Any) -> None:
    def press(words: str) -> None:
        button = next(each for each in browser.find_elements(By.TAG_NAME, "button") if each.text == words)
        button.click()

    with served(service.app) as where:
        show(browser, where, 1280)
        browser.find_element(By.NAME, "token").send_keys(service.tokens["submit"])
        press("Go on")
        until(browser, lambda here: here.find_elements(By.LINK_TEXT, "Submit a job"), "the token was not taken")
        browser.get_log("browser")  # Chromium would have a name beside every password
        browser.find_element(By.LINK_TEXT, "Submit a job").click()
        text = browser.find_element(By.ID, "job")
        text.clear()
        text.send_keys("model: {path: llava-12}", Keys.ENTER, "task: red.yaml")
        assert overflow(browser) <= 0
        press("Submit")
        until(browser, lambda here: "/jobs/" in here.current_url, "the job was not taken")
        press("Cancel this job")
        until(browser, lambda here: "cancelled with the token submit" in here.page_source, "it was not cancelled")
        assert complaints(browser) == []
        assert jobs.list_jobs(service.db)[0].state == "cancelled"
        browser.delete_all_cookies()
