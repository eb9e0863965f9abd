"""How long the page of a large job takes to write and to open, and how large it is.

    python tests/benchmarks/report_page.py            10,000 plans, headless Chromium (chromium and chromedriver)

Prints the seconds to write the page, its size, and for five openings the milliseconds until something is painted, until
the page has loaded, and until the first chart is drawn: once each in five browsers that have just started with an empty
profile and shown an empty page ("first"), so that nothing of the report is known to them, and five times more in one of
them ("again").
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests" / "helpers")]

from report_builders import finished_job, record_many  # noqa: E402
from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

from optimizer.reports.html import write_report  # noqa: E402
from storage.database import Database  # noqa: E402

TIMES = """
const page = performance.getEntriesByType('navigation')[0];
const paint = performance.getEntriesByName('first-contentful-paint')[0];
return [paint ? paint.startTime : NaN, page.loadEventEnd];"""


def opened(browser: webdriver.Chrome, url: str) -> tuple[float, float, float]:
    """Milliseconds until painted, loaded, and until the first chart is drawn."""
    started = time.perf_counter()
    browser.get(url)
    chart = browser.find_element(By.ID, "chart-front")
    browser.execute_script("arguments[0].scrollIntoView()", chart)
    WebDriverWait(browser, 60, 0.02).until(lambda _: chart.get_attribute("data-drawn") == "yes")
    drawn = 1000 * (time.perf_counter() - started)
    painted, loaded = browser.execute_script(TIMES)
    return float(painted), float(loaded), drawn


def main() -> None:
    """Write, open, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plans", type=int, default=10_000)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--driver", default="/usr/bin/chromedriver")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "report.html"
        with Database.open(f"sqlite:///{directory}/large.db") as db:
            job_id = finished_job(db)
            record_many(db, job_id, given.plans)
            write_report(db, job_id)  # imports, and the statements' caches
            started = time.perf_counter()
            path.write_text(write_report(db, job_id), encoding="utf-8")
        print(
            f"{given.plans} plans: written in {time.perf_counter() - started:.2f} s, {path.stat().st_size / 1e6:.1f} MB"
        )
        options = webdriver.ChromeOptions()
        options.binary_location = given.chromium
        options.add_argument("--headless=new")
        options.add_argument("--no-sandbox")
        options.add_argument("--window-size=1280,900")
        empty = Path(directory) / "empty.html"
        empty.write_text("<!doctype html><title>empty</title><p>empty</p>", encoding="utf-8")
        times: dict[str, list[tuple[float, float, float]]] = {"first": [], "again": []}
        for number in range(5):
            with webdriver.Chrome(options=options, service=Service(given.driver)) as browser:
                browser.get(empty.as_uri())
                times["first"].append(opened(browser, path.as_uri()))
                if number == 4:
                    times["again"] += [opened(browser, path.as_uri()) for _ in range(5)]
    for which, each in times.items():
        for name, values in zip(("painted", "loaded", "first chart drawn"), zip(*each, strict=True), strict=True):
            print(f"{which} {name:<18} median {statistics.median(values):5.0f} ms, longest {max(values):5.0f} ms")


if __name__ == "__main__":
    main()
