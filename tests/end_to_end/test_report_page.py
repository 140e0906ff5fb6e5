"""The report's page in a headless browser: it draws, its filters work, nothing is logged, nothing is fetched. End to
end because its JavaScript runs nowhere else."""

from __future__ import annotations

import csv
import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_folders import RESULTS, block, finished_run, unfinished_run

from besa_exp.report.command import write_page
from besa_exp.report.read import read_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)
DRIVER = shutil.which("chromedriver")
SILENT = "disable-quic no-first-run disable-background-networking disable-component-update disable-sync"
FLAGS = [f"--{flag}" for flag in f"headless no-sandbox disable-gpu {SILENT} window-size=1280,900".split()]
HOSTILE = '<img src=x onerror="document.title=1">&lt;b&gt;'
SPEED = {"model": "simulated, not measured", "linears": {"self_attn.q_proj": {"sparsity": 0.5, "dense_cycles": 1.0,
         "sparse_cycles": 0.5, "speed_up": 2.0}}}  # fmt: skip
PATIENCE = 600  # seconds

pytestmark = [
    pytest.mark.enable_socket,  # the browser's driver is spoken to on this machine
    pytest.mark.skipif(
        not (BROWSER and DRIVER), reason="needs a browser and its driver: apt-get install chromium chromium-driver"
    ),
]


@pytest.fixture(scope="module")
def report_html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on two models, three methods, two targets; one run apart, one failed; with hostile names."""
    pytest.importorskip("plotly")
    runs = tmp_path_factory.mktemp("runs")
    for model in ("alpha", "beta"):
        for pruner, base in (("besa", 20.0), ("wanda", 25.0)):
            for sparsity in (0.5, 0.7):
                for seed in (0, 1):
                    changes = {"model": model, "pruner": pruner, "seed": seed, "target_sparsity": sparsity}
                    changes |= {"measured_sparsity": sparsity, "perplexity": {"wikitext2": base * sparsity + seed}}
                    changes |= {"blocks": [block(0, sparsity - 0.1), block(1, sparsity + 0.1, 0.03)]}
                    changes |= {"simulated_speed": SPEED, "texts": {"Once": f"upon {HOSTILE}"}}
                    changes |= {"parameters": {"dense": 100, "left": 80}} if pruner == "wanda" else {}
                    steps = 20 if pruner == "besa" else 0
                    finished_run(runs / f"{model}-{pruner}-{sparsity}-{seed}", changes, steps=steps)
    other = RESULTS["calibration"] | {"num_samples": 8}
    finished_run(runs / "of-the-paper", {"model": "meta/Llama-7b", "pruner": "wanda"})
    finished_run(runs / "apart", {"model": "alpha", "pruner": "magnitude", "calibration": other})
    finished_run(runs / "hostile", {"model": HOSTILE, "pruner": HOSTILE})
    unfinished_run(runs / "failed", status="failed", error=f"RunError: {HOSTILE}")
    page = runs / "report.html"
    write_page(read_report([str(runs)]), page)
    return page


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium that records what it logs and requests."""
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, report_html: Path) -> Any:
    """The browser with the page drawn."""
    browser.get_log("performance")
    browser.get(report_html.as_uri())
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready"))
    return browser


def until(holds: Callable[[], Any]) -> Any:
    """Waits for what `holds` returns to be true, and returns it."""
    end = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < end, f"the page did not get there: {found!r}"
        time.sleep(0.05)
    return found


def points_drawn(browser: Any, section: str) -> list[int]:
    """Points of each trace of each chart in the section, once it was looked at and drawn."""
    script = """const plots = [...document.querySelectorAll(`#${arguments[0]} .plot`)];
        const hidden = plots.find((plot) => !plot.querySelector('svg.main-svg'));
        hidden?.scrollIntoView({ behavior: 'instant' });
        return plots.length && !hidden
          && plots.flatMap((plot) => plot.data.map((trace) => (trace.z || [trace.x]).flat().length));"""
    return until(lambda: browser.execute_script(script, section))


def click(browser: Any, label: str) -> None:
    script = """const chips = [...document.querySelectorAll('#filters .chip')];
        chips.find((chip) => chip.textContent.trim() === arguments[0]).querySelector('input').click();"""
    browser.execute_script(script, label)


def text_of(browser: Any, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def test_every_chart_is_drawn_with_its_data(opened: Any) -> None:
    # lines of two methods of two models; of two runs at one target a faint dot each and the mean
    assert sorted(points_drawn(opened, "perplexity")) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert points_drawn(opened, "zero-shot")
    assert set(points_drawn(opened, "depth")) == {2}  # a point a block
    assert points_drawn(opened, "run") == [6, 20, 2, 2]  # heat map, curve, losses before and after


def test_filters_change_what_is_counted_drawn_and_listed(opened: Any) -> None:
    assert text_of(opened, "#count") == "19 of 19 finished runs shown"
    click(opened, "alpha")
    assert text_of(opened, "#count") == "10 of 19 finished runs shown"
    click(opened, "wanda")
    assert text_of(opened, "#count") == "5 of 19 finished runs shown"
    click(opened, "70 %")
    assert text_of(opened, "#count") == "3 of 19 finished runs shown"
    assert sorted(points_drawn(opened, "perplexity")) == [1, 1, 1, 2]  # two seeds of one method, the hostile run
    assert opened.execute_script("return document.querySelectorAll('#runs tbody tr').length") == 3
    opened.execute_script("document.querySelector('#filters [type=reset]').click()")
    until(lambda: text_of(opened, "#count") == "19 of 19 finished runs shown")


def test_filters_that_nothing_passes_say_so(opened: Any) -> None:
    for label in ("50 %", "70 %"):
        click(opened, label)
    for section in ("perplexity", "zero-shot", "run", "runs"):
        assert "passes the filters" in text_of(opened, f"#{section} .empty")


def test_a_reader_chooses_a_run_from_the_table(opened: Any) -> None:
    script = """const row = [...document.querySelectorAll('#runs tbody tr')].find((r) => r.textContent.includes('beta')
        && r.textContent.includes('wanda')); row.querySelector('td button').click();"""
    opened.execute_script(script)
    assert "besa prune pruner=wanda" in text_of(opened, "#run-body")
    assert "takes no optimisation steps" in text_of(opened, "#run-body")
    assert '"num_samples": 128' in text_of(opened, "#run-body")
    captions = "return [...document.querySelectorAll('#run-body caption')].map((caption) => caption.textContent)"
    assert any(caption.startswith("Speed, simulated, not measured") for caption in opened.execute_script(captions))


def test_what_stands_apart_and_what_failed_is_told_with_the_reason(opened: Any) -> None:
    assert "calibration size: 8 x 2048 tokens (the others: 128 x 2048 tokens)" in text_of(opened, "#apart-table")
    assert f"RunError: {HOSTILE}" in text_of(opened, "#unfinished-table")
    assert "paper 6.86" in text_of(opened, "#paper-table")


def test_the_page_begins_with_a_table_whose_best_is_bold(opened: Any) -> None:
    script = """const tables = [...document.querySelectorAll('#results-tables table')];
        const table = tables.find((one) => one.caption.textContent.startsWith('alpha'));
        return [table.caption.textContent, [...table.tHead.rows[0].cells].map((cell) => cell.textContent),
            [...table.querySelectorAll('tbody tr')].map((row) => [row.cells[0].textContent,
                [...row.cells].map((cell) => Boolean(cell.querySelector('strong')))])];"""
    caption, heads, rows = opened.execute_script(script)
    assert caption == "alpha: wikitext2"
    assert heads == ["method", "50 %", "70 %"]
    assert rows == [["besa", [False, True, True]], ["wanda", [False, False, False]]]


def test_a_click_in_the_legend_hides_a_method_in_every_chart(opened: Any) -> None:
    before = len(points_drawn(opened, "perplexity"))
    script = """const buttons = [...document.querySelectorAll('[data-legend="perplexity"] button')];
        const button = buttons.find((one) => one.textContent === 'besa'); button.click();"""
    opened.execute_script(script)
    assert len(points_drawn(opened, "perplexity")) == before - 2  # of alpha and of beta
    pressed = 'return document.querySelector(\'[data-legend="perplexity"] [aria-pressed="false"]\').textContent'
    assert opened.execute_script(pressed) == "besa"
    assert text_of(opened, "#count") == "19 of 19 finished runs shown"  # tables keep it
    opened.execute_script(script)
    assert len(points_drawn(opened, "perplexity")) == before


def test_a_link_restores_what_was_chosen(opened: Any) -> None:
    chosen = "return [...document.querySelectorAll('#filters input')].map((box) => box.checked)"
    for label in ("alpha", "wanda", "70 %"):
        click(opened, label)
    before = (text_of(opened, "#count"), opened.execute_script(chosen))
    opened.execute_script(
        """const clipboard = { writeText: async (text) => { window.copied = text; } };
        Object.defineProperty(navigator, 'clipboard', { value: clipboard });
        document.querySelector('#permalink').click();"""
    )
    link = until(lambda: opened.execute_script("return window.copied"))
    opened.get("about:blank")
    opened.get(link)
    until(lambda: opened.execute_script("return document.documentElement.dataset.ready"))
    assert (text_of(opened, "#count"), opened.execute_script(chosen)) == before
    assert before[0] == "3 of 19 finished runs shown"


def test_sizes_are_shown_only_where_something_was_removed_whole(browser: Any, tmp_path: Path) -> None:
    for left in (None, 100, 80):  # None: runs of old say nothing of their parameters
        runs = tmp_path / str(left)
        finished_run(runs / "run", {"parameters": {"dense": 100, "left": left}} if left else {})
        write_page(read_report([str(runs)]), runs / "report.html")
        browser.get((runs / "report.html").as_uri())
        until(lambda: browser.execute_script("return document.documentElement.dataset.ready"))
        assert browser.execute_script("return document.querySelector('#size').hidden") == (left != 80), left
    assert browser.execute_script("return document.querySelector('#paper').hidden")  # no run is of its models


def test_the_colour_of_a_result_says_in_five_steps_what_was_lost(browser: Any, tmp_path: Path) -> None:
    lost = {"besa": 1.04, "wanda": 1.19, "ria": 1.99, "sparsegpt": 3.99, "magnitude": 4.1}
    for method, times in lost.items():
        scores = {"perplexity": {"wikitext2": 10 * times}, "dense": {"perplexity": {"wikitext2": 10.0}}}
        finished_run(tmp_path / method, {"pruner": method, **scores})
    write_page(read_report([str(tmp_path)]), tmp_path / "report.html")
    browser.get((tmp_path / "report.html").as_uri())
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready"))
    script = """return [...document.querySelectorAll('#results-tables tbody tr')].map((row) => {
        const [head, cell] = row.cells;
        return [head.textContent, cell.className, getComputedStyle(cell).backgroundColor]; })"""
    (dense, own, _), *rows = browser.execute_script(script)
    assert dense == "dense"
    names = ("little", "some", "much", "high", "extreme")
    assert not {*own.split()} & {*names}
    assert [(method, *({*own.split()} & {*names})) for method, own, _ in rows] == [*zip(lost, names, strict=True)]
    assert len({colour for *_, colour in rows}) == len(names)


def test_the_theme_can_be_switched_and_the_size_is_drawn(opened: Any) -> None:
    look = """const chart = document.querySelector('#size .plot');
        return [getComputedStyle(document.body).backgroundColor, document.querySelector('#theme').textContent,
            chart.layout.font.color, chart.data[0].marker.color];"""
    assert points_drawn(opened, "size") == [4, 4]  # wanda's runs of each model: of the others nothing was removed
    before = opened.execute_script(look)
    opened.execute_script("document.querySelector('#theme').click()")
    points_drawn(opened, "size")
    assert all(new != old for new, old in zip(opened.execute_script(look), before, strict=True))
    assert "upon <img" in text_of(opened, "#run-body")


def test_the_rows_that_are_shown_are_saved(opened: Any) -> None:
    click(opened, "beta")
    opened.execute_script(
        """URL.createObjectURL = (blob) => { blob.text().then((text) => { window.saved = text; }); return "data:,"; };
        document.querySelector('#csv').click();"""
    )
    rows = list(csv.DictReader(io.StringIO(until(lambda: opened.execute_script("return window.saved")))))
    assert len(rows) == opened.execute_script("return document.querySelectorAll('#runs tbody tr').length")
    assert {row["model"] for row in rows} == {"alpha", HOSTILE, "Llama-7b"}
    assert sorted(row["folder"].rpartition("/")[2] for row in rows if row["method"] == "besa") == [
        "alpha-besa-0.5-0", "alpha-besa-0.5-1", "alpha-besa-0.7-0", "alpha-besa-0.7-1"
    ]  # fmt: skip


def test_two_runs_beside_each_other_have_one_range_of_colours(opened: Any) -> None:
    script = """const select = document.getElementById('beside');
        select.value = [...select.options].find((option) => option.text === 'wanda, 70 %, seed 0').value;
        select.dispatchEvent(new Event('change'));"""
    opened.execute_script(script)
    points_drawn(opened, "run")
    ranges = """return [...document.querySelectorAll('#run .plot')].flatMap((plot) => plot.data)
        .filter((trace) => trace.type === 'heatmap').map((trace) => [trace.zmin, trace.zmax]);"""
    one, other = opened.execute_script(ranges)
    assert one == pytest.approx(other)
    assert one == pytest.approx([0.375, 0.825])  # between both runs' 50 and 70 %, as far as any linear is from that


def test_no_heading_is_hidden_below_the_bar(opened: Any) -> None:
    script = """document.documentElement.style.scrollBehavior = 'auto'; location.hash = ''; location.hash = '#run';
        return document.getElementById('run-head').getBoundingClientRect().top
            >= document.getElementById('filters').getBoundingClientRect().bottom;"""
    for open_ in (False, True):
        opened.execute_script("document.getElementById('filter-box').open = arguments[0]", open_)
        until(lambda: opened.execute_script(script))  # when the observer has seen its size


def test_axes_show_no_share_below_zero_or_above_one(browser: Any, tmp_path: Path) -> None:
    for at, share in enumerate((0.001, 0.999)):
        changes = {"target_sparsity": share, "measured_sparsity": share, "zero_shot": {"piqa": {"acc,none": float(at)}}}
        finished_run(tmp_path / str(at), changes)
    write_page(read_report([str(tmp_path)]), tmp_path / "report.html")
    browser.get((tmp_path / "report.html").as_uri())
    until(lambda: browser.execute_script("return document.documentElement.dataset.ready"))
    for section, axes in (("perplexity", ("xaxis",)), ("zero-shot", ("xaxis", "yaxis"))):
        points_drawn(browser, section)
        for axis in axes:
            script = "return document.querySelector(`#${arguments[0]} .plot`).layout[arguments[1]].range"
            assert browser.execute_script(script, section, axis) == [0, 1], (section, axis)


def test_paper_gets_whole_tables_and_all_charts_and_no_controls(opened: Any) -> None:
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    opened.execute_script("window.dispatchEvent(new Event('beforeprint'))")
    drawn = "return [...document.querySelectorAll('.plot')].map((plot) => Boolean(plot.querySelector('svg.main-svg')))"
    assert set(opened.execute_script(drawn)) == {True}
    style = "return [...document.querySelectorAll(arguments[0])].map((one) => getComputedStyle(one)[arguments[1]])"
    for hidden in ("#filters", "nav", ".controls", "footer", "#run pre", "#runs td:last-child"):
        assert set(opened.execute_script(style, hidden, "display")) == {"none"}, hidden
    assert set(opened.execute_script(style, ".scroll", "overflowX")) == {"visible"}
    assert set(opened.execute_script(style, ".tall", "maxHeight")) == {"none"}
    assert set(opened.execute_script(style, "section", "contentVisibility")) == {"visible"}
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_nothing_is_logged_fetched_or_run_but_the_page(opened: Any, report_html: Path) -> None:
    for section in ("perplexity", "zero-shot", "depth", "run"):
        points_drawn(opened, section)
    assert opened.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    by_page = [one["request"]["url"] for one in sent if not one["documentURL"].startswith("chrome://")]  # its new tab
    assert [url for url in by_page if not url.startswith("data:")] == [report_html.as_uri()]
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert opened.title == "besa report"


@pytest.mark.parametrize(("width", "scheme"), [(1280, "dark"), (390, "light")])
def test_no_width_makes_the_page_scroll_sideways(opened: Any, width: int, scheme: str) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    opened.refresh()
    until(lambda: opened.execute_script("return document.documentElement.dataset.ready"))
    points_drawn(opened, "perplexity")
    opened.execute_script("document.getElementById('filter-box').open = true")
    wide = """const parts = [document.documentElement, ...document.querySelectorAll('section, #filters')];
        parts.forEach((part) => { part.style.contentVisibility = 'visible'; }); // else what sticks out is cut off
        return parts.filter((part) => part.scrollWidth > part.clientWidth).map((part) => part.id || part.tagName);"""
    assert opened.execute_script(wide) == []
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
