"""The report in a real browser: headless Chromium driven over ChromeDriver's HTTP interface (W3C WebDriver).

Chromium and chromium-driver must be installed; `KD_NO_BROWSER=1` skips these tests where they cannot be.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from kdcore.report import write_report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("KD_NO_BROWSER") == "1", reason="KD_NO_BROWSER=1: no browser on this machine"),
]
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]


class Browser:
    """One WebDriver session."""

    def __init__(self, profile: Path):
        driver = shutil.which("chromedriver")
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if driver is None or chromium is None:
            pytest.fail(
                "the report's browser tests need Chromium and ChromeDriver: `apt-get install chromium chromium-driver` "
                "(Debian); set KD_NO_BROWSER=1 to skip them"
            )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.root = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            self._wait_until_ready()
            options = {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={profile}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = self.request("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        self.root += f"/session/{session}"

    def _wait_until_ready(self) -> None:
        for _ in range(150):
            try:
                self.request("GET", "/status")
            except OSError:
                time.sleep(0.1)
            else:
                return
        pytest.fail("chromedriver did not answer within 15 s")

    def request(self, verb: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=verb)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{verb} {path}: {error.read().decode()}") from None

    def open(self, page: Path) -> None:
        self.request("POST", "/url", {"url": page.as_uri()})

    def devtools(self, command: str, **parameters):
        return self.request("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def js(self, script: str, *arguments):
        return self.request("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def element(self, selector: str) -> dict[str, str]:
        return self.request("POST", "/element", {"using": "css selector", "value": selector})

    def click(self, selector: str) -> None:
        (identity,) = self.element(selector).values()
        self.request("POST", f"/element/{identity}/click", {})

    def hover(self, selector: str) -> None:
        self.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center', behavior: 'instant'})", selector)
        move = {"type": "pointerMove", "duration": 0, "x": 5, "y": 5, "origin": self.element(selector)}
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
        self.request("POST", "/actions", {"actions": [mouse]})

    def press(self, key: str) -> None:
        actions = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.request("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def console(self) -> list[dict]:
        return self.request("POST", "/se/log", {"type": "browser"})

    def screen(self, width: int, scheme: str = "light") -> None:
        """A window of `width` CSS pixels in the given colour scheme."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def close(self) -> None:
        try:
            self.request("DELETE", "")
        finally:
            self.process.terminate()
            self.process.wait(timeout=20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def make_run(folder: Path, seed: int) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text(f"method: blend\nseed: {seed}\nstudent: a_student_with_quite_a_long_name\n")
    lines = []
    for step in range(1, 1201):
        ce = 2.0 * math.exp(-step / 200) + 0.05 * seed + 0.01 * math.sin(step)
        terms = {"ce": {"raw": ce, "weighted": ce}, "kd": {"raw": ce * ce, "weighted": 0.5 * step / 1200 * ce * ce}}
        shared = {"stage": "student", "step": step, "epoch": step // 100}
        total = sum(term["weighted"] for term in terms.values())
        speed = {"total": total, "lr": 0.1 * (1 - step / 1200), "samples_per_second": 900.0 + step % 7}
        lines.append({"kind": "train", "player": "student", "terms": terms, **speed, **shared})
        if step % 100 == 0:
            lines.append({"kind": "eval", "metrics": {"accuracy": 0.9 - 0.5 * math.exp(-step / 300)}, **shared})
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    counts = np.full((10, 10), 1) + 30 * np.eye(10, dtype=int)
    results = {"student/accuracy": 0.9 + seed / 100, "teacher/accuracy": 0.97, "confusion_matrix": counts.tolist()}
    (folder / "metrics.json").write_text(json.dumps({**results, "class_names": [f"digit {i}" for i in range(10)]}))
    (folder / "stages.json").write_text('{"student": {"student": "student"}}')
    return folder


def predict(config, artefacts, count):
    generator = np.random.default_rng(0)
    return [
        {
            "image": generator.integers(0, 256, (8, 8, 3), dtype=np.uint8),
            "truth": str(index),
            "teacher": {"label": str(index), "probability": 0.9},
            "student": {"label": str(index if index % 3 else 0), "probability": 0.6},
        }
        for index in range(count)
    ]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of one run, and the page of two."""
    folder = tmp_path_factory.mktemp("runs")
    module = types.ModuleType("kdcore.run")
    module.load_run = lambda run: (types.SimpleNamespace(key="blend", predict=predict), None, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kdcore.run", module)
        first, second = make_run(folder / "first", 1), make_run(folder / "second", 2)
        return write_report([first], samples=9), write_report([first, second], samples=9)


def without_scripts(page: Path) -> Path:
    """A copy of `page` whose scripts do not run. Switching them off does not do: the driver needs them itself."""
    text = page.read_text(encoding="utf-8")
    assert "<noscript" not in text  # which would be shown where scripts are switched off, and here would not
    copy = page.with_name("without_scripts.html")
    copy.write_text(text.replace("<script>", '<script type="text/plain">'), encoding="utf-8")
    assert copy.read_text(encoding="utf-8") != text
    return copy


@pytest.fixture(params=[0, 1], ids=["one", "two"])
def page(request, pages, browser):
    browser.screen(1280)
    browser.console()  # drops what an earlier page left
    browser.open(pages[request.param])
    return request.param + 1


VISIBLE = """
return [...document.querySelectorAll('.chart')].map(chart => [...chart.querySelectorAll('.plot')]
    .filter(plot => getComputedStyle(plot).display !== 'none')
    .map(plot => ({term: plot.dataset.term, scale: plot.dataset.scale,
        lines: [...plot.querySelectorAll('path.line')].map(line => ({d: line.getAttribute('d'),
            width: line.getBoundingClientRect().width, height: line.getBoundingClientRect().height}))})))
"""


def test_curves_are_drawn_one_drawing_per_chart(browser, page):
    charts = browser.js(VISIBLE)
    assert len(charts) == 6  # ce, kd, total, learning rate, samples per second; accuracy
    for plots in charts:
        (plot,) = plots
        assert plot["scale"] == "linear"
        assert len(plot["lines"]) == page
        for line in plot["lines"]:
            assert 12 <= line["d"].count("L") + line["d"].count("M") <= 500
            assert line["width"] > 150
            assert line["height"] > 20


def test_switches_change_the_drawings(browser, page):
    before = browser.js(VISIBLE)
    browser.click("label[for=term-weighted]")
    weighted = browser.js(VISIBLE)
    changed = [old != new for old, new in zip(before, weighted, strict=True)]
    assert changed == [False, True, False, False, False, False]  # kd alone has a weight that is not 1
    assert weighted[1][0]["term"] == "weighted"
    browser.click("label[for=scale-log]")
    logarithmic = browser.js(VISIBLE)
    assert all(plot["scale"] == "log" for (plot,) in logarithmic)
    assert all(
        old["lines"][0]["d"] != new["lines"][0]["d"] for (old,), (new,) in zip(weighted, logarithmic, strict=True)
    )
    browser.click("label[for=scale-linear]")
    browser.click("label[for=term-raw]")
    assert browser.js(VISIBLE) == before


def test_switches_work_from_the_keyboard_and_without_scripts(browser, pages):
    browser.screen(1280)
    browser.open(without_scripts(pages[0]))
    assert browser.js("return document.querySelectorAll('.cursor, .tip').length") == 0
    browser.hover(".chart > svg")
    assert browser.js("return document.querySelectorAll('.tip').length") == 0
    browser.js("document.querySelector('#scale-linear').focus()")
    browser.press("\ue014")  # right arrow
    assert all(plot["scale"] == "log" for (plot,) in browser.js(VISIBLE))


def test_values_show_under_the_pointer_and_by_arrow_keys(browser, page):
    browser.hover(".chart > svg")
    text = browser.js("return document.querySelector('.tip').innerText")
    assert text.startswith("step ")
    assert browser.js("return document.querySelectorAll('.cursor circle').length") == page
    if page == 2:
        assert "first: " in text
        assert "second: " in text
    browser.js("document.querySelectorAll('.chart > svg')[1].focus()")
    browser.press("\ue014")
    text = browser.js("return document.querySelectorAll('.chart')[1].querySelector('.tip').innerText")
    kd = (2.0 * math.exp(-1 / 200) + 0.05 + 0.01 * math.sin(1)) ** 2
    assert text.startswith("step 1")
    assert f"{kd:.3f}" in text
    browser.press("\ue00c")  # escape
    assert browser.js("return document.querySelectorAll('.chart')[1].querySelectorAll('.tip').length") == 0


def test_confusion_matrix_is_coloured_by_its_rows(browser, page):
    tables = browser.js(
        "return [...document.querySelectorAll('table.heat')].map(table => [...table.tBodies[0].rows].map(row =>"
        "[...row.cells].slice(1, 11).map(cell => [cell.textContent, getComputedStyle(cell).backgroundColor])))"
    )
    assert len(tables) == page
    for rows in tables:
        assert [[int(text) for text, _ in row] for row in rows] == (1 + 30 * np.eye(10, dtype=int)).tolist()
        assert rows[0][0][1] != rows[0][1][1]
        assert {row[index][1] for index, row in enumerate(rows)} == {rows[0][0][1]}


def test_pictures_are_decoded_with_disagreements_first(browser, page):
    browser.js("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    pictures = browser.js(
        "return [...document.querySelectorAll('.sample')].map(sample => { const image = sample.querySelector('img');"
        "return [sample.classList.contains('disagree'), image.complete, image.naturalWidth, image.clientWidth] })"
    )
    assert len(pictures) == 9 * page
    assert [picture[0] for picture in pictures[:9]] == [True] * 2 + [False] * 7
    assert all(complete and natural == 8 and shown >= 64 for _, complete, natural, shown in pictures)


def test_nothing_is_loaded_and_the_console_stays_empty(browser, page):
    browser.hover(".chart > svg")
    browser.click("label[for=scale-log]")
    loaded = browser.js("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert [name for name in loaded if not name.startswith("data:")] == []
    assert browser.console() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_page_fits_phone_and_desktop_in_both_schemes(browser, page, width, scheme):
    browser.screen(width, scheme)
    assert browser.js("return document.documentElement.scrollWidth") <= width
    red, green, blue = browser.js(
        "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
    )
    assert (red + green + blue > 600) == (scheme == "light")
    narrowest = browser.js("return Math.min(...[...document.querySelectorAll('.chart')].map(c => c.clientWidth))")
    assert narrowest > 300


# ---------------------------------------------------------------- generators: rows of pictures, profiles


def rows_of_pictures(config, artefacts, count):
    generator = np.random.default_rng(0)

    def noise(width):
        return generator.integers(0, 256, (8, width), dtype=np.uint8)

    columns = {"teacher, its path": 53, "teacher, 50 steps": 8, "step 100": 8, "step 200": 8, "student": 8}
    return [{"caption": f"digit {i}", "images": {name: noise(w) for name, w in columns.items()}} for i in range(3)]


@pytest.fixture(scope="module")
def generator_page(tmp_path_factory):
    """The page of a run with three players, whose method generates and logs a profile."""
    run = make_run(tmp_path_factory.mktemp("generators") / "run", 1)
    lines = []
    for step in range(1, 101):
        for player, terms in (("generator", ("matching",)), ("fake", ("denoising",)), ("judge", ("real", "made"))):
            values = {name: {"raw": len(name) / step, "weighted": len(name) / step} for name in terms}
            lines.append({"kind": "train", "stage": "student", "player": player, "step": step, "terms": values})
        if step % 20 == 0:
            x, values = [f"{10 * k}-{10 * k + 10} %" for k in range(10)], [None, *(step / k for k in range(1, 10))]
            shared = {"name": "gradient by level", "stage": "student", "step": step}
            lines.append({"kind": "profile", **shared, "x": x, "values": values})
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    module = types.ModuleType("kdcore.run")
    module.load_run = lambda run: (types.SimpleNamespace(key="blend", predict=rows_of_pictures), None, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kdcore.run", module)
        return write_report([run])


@pytest.mark.parametrize("scripts", [True, False])
@pytest.mark.parametrize("width", [360, 1280])
def test_rows_of_pictures_scroll_inside_the_page(browser, generator_page, width, scripts):
    browser.screen(width)
    browser.console()
    browser.open(generator_page if scripts else without_scripts(generator_page))
    assert browser.js("return document.documentElement.scrollWidth") <= width
    shown = browser.js(
        "return [...document.querySelectorAll('.pictures img')].map(image => [image.complete, image.naturalWidth,"
        "image.clientWidth, image.clientHeight, getComputedStyle(image).imageRendering, image.alt])"
    )
    assert len(shown) == 15
    assert all(complete and rendering == "pixelated" for complete, *_, rendering, _ in shown)
    assert {(natural, w, h) for _, natural, w, h, _, _ in shown} == {(53, 742, 112), (8, 112, 112)}
    assert shown[4][-1] == "digit 0: student"
    lefts = browser.js(
        "return [...document.querySelectorAll('.pictures tr')].map(row =>"
        "[...row.cells].map(cell => cell.getBoundingClientRect().left))"
    )
    assert len(lefts) == 4
    assert all(row == lefts[0] for row in lefts)
    moved = browser.js(
        "const box = document.querySelector('.scroll:has(.pictures)'), label = box.querySelector('tbody th');"
        "box.scrollLeft = 1e4; const edge = box.getBoundingClientRect();"
        "return [box.scrollLeft, label.getBoundingClientRect().left - edge.left,"
        "edge.right - box.querySelector('tbody td:last-child').getBoundingClientRect().right]"
    )
    assert moved[0] > 0  # wider than the page
    assert abs(moved[1]) <= 2  # the caption stays in view
    assert abs(moved[2]) <= 2  # the last column can be reached
    assert browser.console() == []


def test_profile_shows_its_labels_and_steps_under_the_pointer(browser, generator_page):
    browser.screen(1280)
    browser.open(generator_page)
    charts = browser.js("return [...document.querySelectorAll('.chart strong')].map(title => title.textContent)")
    assert charts == ["matching", "denoising", "real", "made", "gradient by level"]
    labels = browser.js("return [...document.querySelectorAll('#profiles .last li')].map(item => item.textContent)")
    assert labels == [f"step {step}" for step in range(20, 101, 20)]
    overlaps = browser.js(
        "const ticks = [...document.querySelectorAll('#profiles .plot[data-scale=linear] text')].filter(text =>"
        "text.textContent.includes('%')).map(text => text.getBoundingClientRect());"
        "return [ticks.length, ticks.slice(1).filter((box, i) => box.left < ticks[i].right).length]"
    )
    assert overlaps == [5, 0]
    browser.hover("#profiles .chart > svg")
    browser.js("document.querySelector('#profiles .chart > svg').focus()")
    browser.press("\ue00c")  # escape
    tip = "return document.querySelector('#profiles .tip').innerText"
    browser.press("\ue014")  # right arrow: the first label, where every step has a gap
    assert browser.js(tip).split("\n") == ["0-10 %", *(f"step {step}: no value" for step in range(20, 101, 20))]
    browser.press("\ue014")
    assert browser.js(tip).split("\n") == ["10-20 %", *(f"step {step}: {step}" for step in range(20, 101, 20))]
    browser.click("label[for=scale-log]")
    visible = browser.js(VISIBLE)[4]
    assert [(plot["scale"], len(plot["lines"])) for plot in visible] == [("log", 5)]
    assert browser.console() == []
