"""report.html in a real browser: no network, no complaint, marks in every chart, quick."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, INSTALL, chromium, opened
from playwright.sync_api import Browser, Page
from sweep_folders import grid, study, write_sweep

from specforge_exp.config import ReportConfig
from specforge_exp.stages.report import make

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=INSTALL)

COLOURED = """() => {
  const canvases = (root) => [...root.querySelectorAll("*")].flatMap(
    (e) => e.shadowRoot ? canvases(e.shadowRoot) : e.tagName === "CANVAS" ? [e] : []);
  const count = (canvas) => {
    if (!canvas.width || !canvas.height) return 0;
    const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    let found = 0;
    for (let i = 0; i < data.length; i += 4)
    {
      const [r, g, b, opaque] = data.subarray(i, i + 4);
      if (opaque > 40 && Math.max(r, g, b) - Math.min(r, g, b) > 60) found++;
    }
    return found;
  };
  return Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) => [
    chart.dataset.chart, canvases(chart).reduce((sum, canvas) => sum + count(canvas), 0)]));
}"""
"""Pixels of a saturated colour on every chart; text, axes and grid lines are grey."""


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plans = grid(bench=("stories", "arithmetic", "code"))
    plans[4].status, plans[4].error = "failed", "InputError: the loss is nan at step 30"
    sweep = write_sweep(tmp_path_factory.mktemp("twelve"), plans)
    make(sweep, ReportConfig(resamples=200))
    return sweep / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def shown(browser: Browser, twelve: Path) -> Iterator[Page]:
    """For tests that only look at it."""
    with opened(browser, twelve) as found:
        yield found


@pytest.fixture
def page(browser: Browser, twelve: Path) -> Iterator[Page]:
    """For a test that changes it."""
    with opened(browser, twelve) as found:
        yield found


def check_quiet(page: Any) -> None:
    assert page.complaints == []
    outside = [url for url in page.asked if not url.startswith(("file:", "data:", "blob:"))]
    assert outside == [] and len([url for url in page.asked if url.startswith("file:")]) == 1


def column(page: Page, place: int) -> list[str]:
    cells = page.locator("table.runs").first.locator(f"tbody tr:visible td:nth-child({place})")
    return [cell.strip() for cell in cells.all_text_contents()]


def test_holds_no_address(twelve: Path) -> None:
    assert "://" not in twelve.read_text()


def test_opens_without_complaint_and_asks_no_network(shown: Page) -> None:
    check_quiet(shown)
    assert "full-opd_lr3e-05 is best" in shown.locator(".head h2").inner_text()
    assert shown.locator("table.runs tbody tr").count() == 12
    assert "the loss is nan at step 30" in shown.locator("table.failures").inner_text()


def test_every_chart_has_marks(shown: Page) -> None:
    found = shown.evaluate(COLOURED)
    assert set(found) == {
        "ranking", "rate", "loss", "simulated_length", "alpha", "unroll", "datasets",
    }  # fmt: skip
    assert all(count > 200 for count in found.values()), found


def test_table_sorts_on_click(page: Page) -> None:
    heads = page.locator("table.runs").first.locator("th")
    names = [text.strip() for text in heads.all_text_contents()]
    place = names.index("GPU hours") - 1  # alpha at step 0
    button = heads.nth(place).locator("button")
    button.click()
    rising = [float(text) for text in column(page, place + 1)]
    assert rising == sorted(rising) and len(rising) == 12
    assert heads.nth(place).get_attribute("aria-sort") == "ascending"
    button.click()
    assert [float(text) for text in column(page, place + 1)] == sorted(rising, reverse=True)
    heads.nth(0).locator("button").click()
    assert column(page, 1) == [*map(str, range(1, 12)), ""]
    heads.nth(0).locator("button").click()
    assert column(page, 1) == [*map(str, range(11, 0, -1)), ""], "without a rank stays last"


def test_a_click_on_the_legend_hides_a_loss_everywhere(page: Page) -> None:
    before = page.evaluate(COLOURED)
    for loss in ("baseline", "rkl-only", "mixed", "full-opd"):
        page.locator(f'.legend button[data-loss="{loss}"]').click()
    page.wait_for_function(f"() => Object.values(({COLOURED})()).every((count) => count < 50)")
    assert page.locator("table.runs tbody tr:visible").count() == 0
    page.locator('.legend button[data-loss="mixed"]').click()
    page.wait_for_function(f"() => Object.values(({COLOURED})()).every((count) => count > 50)")
    assert page.locator("table.runs tbody tr:visible").count() == 3
    assert all(count < before[key] for key, count in page.evaluate(COLOURED).items())
    check_quiet(page)


def test_acceptance_rates_switch_between_unroll_steps(page: Page) -> None:
    chart = page.locator('.chart[data-chart="alpha"]')
    fields = (
        "() => [...new Set(figures.get('alpha').renderers.flatMap("
        "(r) => [r.glyph.ys.field, r.glyph.xs.field]))]"
    )
    assert page.evaluate(fields) == ["training:0", "training:x"]
    first = chart.locator(".plot").screenshot()
    chart.locator('.switch button[data-value="5"]').click()
    chart.locator('.switch button[data-value="held-out"]').click()
    assert page.evaluate(fields) == ["held-out:5", "held-out:x"]
    page.wait_for_function(f"() => ({COLOURED})().alpha > 200")
    assert chart.locator(".plot").screenshot() != first
    check_quiet(page)


def test_hover_names_the_run(shown: Page) -> None:
    plot = shown.locator('.chart[data-chart="ranking"] .plot')
    plot.scroll_into_view_if_needed()
    spot = shown.evaluate(
        """() => {
          const figure = figures.get("ranking"), view = Bokeh.index.get_by_id(figure.id);
          const dots = figure.renderers.find(
            (r) => r.name === "full-opd" && r.glyph.type === "Scatter").data_source.data;
          const box = document.getElementById("chart-ranking").getBoundingClientRect();
          return [box.x + view.frame.x_scale.compute(dots.value[0]),
                  box.y + view.frame.y_scale.compute(dots.place[0])];
        }"""
    )
    shown.mouse.move(spot[0] - 1, spot[1])
    shown.mouse.move(*spot)
    shown.locator(".bk-tooltip-row-value").get_by_text("full-opd_lr3e-05").wait_for(timeout=10_000)
    values = shown.locator(".bk-tooltip-row-value").all_text_contents()
    assert len(values) == 4 and " to " in values[2] and values[3].strip() == "best"


def test_a_row_gives_its_command(shown: Page) -> None:
    shown.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button = shown.locator("table.runs tbody tr").first.locator("button.copy")
    assert button.get_attribute("data-copy") == "python train.py loss=full-opd lr=3e-05"
    button.click()
    shown.wait_for_function("document.querySelector('button.copy.done') !== null")


def test_a_study_on_the_page(browser: Browser, tmp_path: Path) -> None:
    goals = (("simulated_length", "maximize"), ("gpu_hours", "minimize"))
    objectives = [{"name": name, "direction": goes} for name, goes in goals]
    sweep = write_sweep(tmp_path, study(), kind="study", objectives=objectives)
    make(sweep, ReportConfig(resamples=50))
    with opened(browser, sweep / "report.html") as page:
        check_quiet(page)
        found = page.evaluate(COLOURED)
        assert {"pareto", "history", "slice-lr", "slice-loss", "slice-loss.beta"} < set(found)
        assert all(count > 100 for count in found.values()), found
        page.locator("input.filter").fill("full-opd running")
        assert page.locator("table.runs tbody tr:visible").count() == 1


def test_an_empty_sweep_opens(browser: Browser, tmp_path: Path) -> None:
    plans = grid(("baseline",))
    for plan in plans:
        plan.status = "planned"
    sweep = write_sweep(tmp_path, plans, state="running")
    make(sweep, ReportConfig())
    with opened(browser, sweep / "report.html") as page:
        check_quiet(page)
        assert "No run has finished" in page.locator(".head h2").inner_text()


@pytest.mark.slow
def test_two_hundred_runs_of_a_thousand_points(browser: Browser, tmp_path: Path) -> None:
    plans = [plan for _ in range(17) for plan in grid(points=1000)][:200]
    for number, plan in enumerate(plans):
        plan.name += f"_v{number}"
        plan.overrides.append(f"draft.layers={number}")
    sweep = write_sweep(tmp_path, plans)
    make(sweep, ReportConfig(resamples=100))
    html = sweep / "report.html"
    assert html.stat().st_size < 5e6
    with (sweep / "curves.csv").open() as file:
        assert sum(line.split(",")[2] == "loss" for line in file) == 200 * 1000
    with opened(browser, html) as page:
        check_quiet(page)
        assert all(count > 1000 for count in page.evaluate(COLOURED).values())
        assert computing(page) < 2.5


def computing(page: Page) -> float:
    """CPU seconds of the page's main thread to load it and draw all its charts.

    Seconds of the clock would count what else runs on the machine.
    """
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def spent() -> float:
        metrics = session.send("Performance.getMetrics")["metrics"]
        return float(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))

    before = spent()
    page.reload()
    page.wait_for_function("document.documentElement.dataset.drawn")
    return spent() - before
