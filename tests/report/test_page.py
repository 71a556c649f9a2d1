"""The report page, in a real browser: what a reader sees, and what it never does."""

import html
import json
import os
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from reference import random_store

from hf_auxselect import LinearizedTraining, SelectionReport
from hf_auxselect.report.content import Measurement
from hf_auxselect.report.page import decision_title, leave_one_out_sentences
from hf_auxselect.selectors import ForwardSelection, SelectionProblem

HOSTILE = [
    '</script><script>alert("1")</script>',
    "'\"><img src=x onerror=alert(2)>",
    "\u202edesrever\u202c {{ 7 * 7 }} & &amp;",
    "n" * 300,
    "🎲 ünï=a,b;c%20#&d",
]
WIDTHS = (380, 1600)


def report_on(counts, *, names=None, seed=1, verified=True):
    """A report on random gradients, with a ground-truth run of the chosen mixture."""
    store = random_store(seed, counts=counts)
    if names is not None:
        store.task_names[:] = names
    fitted = LinearizedTraining().fit(store)
    problem = SelectionProblem(fitted.estimate, store.task_names, store.task_sizes)
    selection = ForwardSelection().select(problem)
    report = SelectionReport(
        weights=selection.weights,
        history=list(selection.history),
        estimator={"name": "LinearizedTraining"},
        selector={"name": "ForwardSelection"},
        run={
            "created": "2026-11-28T07:16:00+00:00",
            "after": "continue",
            "switch_step": 4,
            "max_steps": 12,
            "model": names[0] if names else "tiny",
            "seconds": 1.5,
            "reads_per_row": dict.fromkeys(store.task_names, 1.0),
        },
        warnings=[f"a warning about {names[0]}"] if names else [],
    )
    report.add_estimates(fitted, selection, store, seed=0)
    if verified:
        row = report.row("chosen")
        report.verification = [
            Measurement(
                name="chosen",
                weights=report.weights,
                estimated=row.loss,
                low=row.low,
                high=row.high,
                measured=row.loss + 0.01,
                seconds=2.0,
            )
        ]
    return report


@pytest.fixture(scope="module")
def report():
    return report_on((9, 8, 7, 6, 5))


@pytest.fixture(scope="module")
def browser():
    required = os.environ.get("HF_AUXSELECT_REQUIRE_BROWSER")
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if executable is None and not required:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens a report's page; the page must be silent and make no request when the test ends."""
    said, pages = [], []

    def open_it(report, *, width=1000, hash="", **options):
        path = tmp_path / "report" / "index.html"
        if not path.exists():
            path.parent.mkdir()
            path.write_text(report.to_html(), "utf-8")
        page = browser.new_page(viewport={"width": width, "height": 900}, **options)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request",
            lambda request: said.append(request.url) if request.url[:5] == "http:" else None,
        )
        page.on("dialog", lambda dialog: said.append("dialog"))
        page.route("http*://**", lambda route: said.append(route.request.url))
        page.goto(f"{path.as_uri()}{hash}")
        pages.append(page)
        return page

    yield open_it
    for page in pages:
        page.close()
    assert said == []


def shares_of(page):
    """What the page's control shows, as shares."""
    cells = page.locator("#mixture td.number").all_text_contents()
    return np.array([float(cell) / 100 for cell in cells])


class TestItsNumbers:
    def test_tables_have_the_numbers_of_the_json(self, open_page, report):
        page = open_page(report)
        for row in report.to_dict()["rows"]:
            cells = page.locator(f'tr[data-row="{row["name"]}"] td.number').all_text_contents()
            assert cells == [f"{row['loss']:.4f}", f"{row['low']:.4f} to {row['high']:.4f}"]
        tasks = page.locator("#task-table tbody tr").all()
        assert len(tasks) == 5
        by_name = {task["name"]: task for task in report.to_dict()["tasks"]}
        for task in tasks:
            name = task.locator("bdi").text_content()
            assert f"{100 * report.weights[name]:.1f}%" in task.text_content()
            assert f"{by_name[name]['loss']:.4f}" in task.text_content()
            assert f"{by_name[name]['loss_after']:.4f}" in task.text_content()
        cosines = page.locator("#cosines tbody td").all_text_contents()
        expected = [
            f"{value:.2f}"
            for target, row in zip(report.similarity.target, report.similarity.cosines, strict=True)
            for value in [target, *row]
        ]
        assert cosines == expected

    def test_the_outcome_stands_beside_the_prediction(self, open_page, report):
        page = open_page(report)
        cells = page.locator("#verification tbody td").all_text_contents()
        run = report.verification[0]
        assert cells[0] == f"{run.estimated:.4f}" and cells[2] == f"{run.measured:.4f}"
        assert "2026-11-28 07:16 UTC" in page.locator("main").text_content()

    def test_it_reads_well_without_a_script(self, open_page, report):
        page = open_page(report, java_script_enabled=False)
        text = page.inner_text("body")
        assert decision_title(report) in text
        assert "hf-auxselect what-if" in text
        assert page.locator("#mixture").is_hidden()
        for sentence in leave_one_out_sentences(report):
            assert sentence in text


class TestWhatIf:
    def approximated(self, page):
        return float(page.locator("#loss").get_attribute("data-approximation"))

    def test_it_agrees_with_python(self, open_page, report):
        for shares in ([0.5, 0, 0.25, 0.25, 0], [0, 0, 0, 0.9, 0.1], [0.2, 0.3, 0.1, 0.15, 0.25]):
            mixture = "&".join(f"task{k}={share}" for k, share in enumerate(shares))
            page = open_page(report, hash=f"#{mixture}")
            expected = report.what_if.outputs(np.array([shares]))[0]
            assert self.approximated(page) == pytest.approx(expected[0], abs=1e-6)
            low, high = expected[0] - expected[1], expected[0] + expected[2]
            assert f"{max(low, 0):.4f} to {high:.4f}" in page.text_content("#interval")
            less = expected[0] - report.row("all tasks").loss
            ends = f"({less - expected[3]:.4f} to {less + expected[4]:.4f})"
            assert ends in page.text_content("#difference")

    def test_it_begins_with_the_chosen_mixture_and_its_own_estimate(self, open_page, report):
        page = open_page(report)
        assert shares_of(page) == pytest.approx(list(report.weights.values()), abs=1e-3)
        assert float(page.get_attribute("#loss", "data-value")) == report.row("chosen").loss
        page.click("#set-all")
        assert float(page.get_attribute("#loss", "data-value")) == report.row("all tasks").loss

    def test_ticks_are_subsets_by_rows(self, open_page, report):
        page = open_page(report)
        page.click("#set-all")
        ticks = page.locator("#mixture input[type=checkbox]")
        ticks.nth(1).focus()
        page.keyboard.press("Space")  # usable with the keyboard
        ticks.nth(3).uncheck()
        sizes = np.array([9, 0, 7, 0, 5])
        assert shares_of(page) == pytest.approx(sizes / sizes.sum(), abs=6e-4)
        ticks.nth(3).check()
        sizes[3] = 6
        assert shares_of(page) == pytest.approx(sizes / sizes.sum(), abs=6e-4)
        for k in (0, 2, 3, 4):
            ticks.nth(k).uncheck(force=True) if k != 4 else ticks.nth(k).click()
        assert shares_of(page).tolist() == [0, 0, 0, 0, 1]  # the last one stays

    def test_sliders_keep_the_proportions_of_the_others(self, open_page, report):
        page = open_page(report)
        page.click("#set-all")
        page.locator("#mixture input[type=range]").nth(0).fill("50")
        others = np.array([8, 7, 6, 5]) / 26 / 2
        assert shares_of(page) == pytest.approx([0.5, *others], abs=6e-4)

    def test_the_address_holds_the_mixture(self, open_page, report):
        page = open_page(report)
        page.click("#set-all")
        page.locator("#mixture input[type=range]").nth(2).fill("60")
        again = open_page(report, hash=page.evaluate("location.hash"))
        assert shares_of(again) == pytest.approx(shares_of(page), abs=1e-3)
        assert self.approximated(again) == pytest.approx(self.approximated(page), abs=1e-4)

    def test_the_smallest_change_that_reaches_a_loss(self, open_page, report):
        page = open_page(report)
        page.click("#set-all")
        before, start = shares_of(page), self.approximated(page)
        lowest = report.what_if.outputs(np.eye(5))[:, 0].min()
        goal = start - 0.5 * (start - lowest)
        page.fill("#goal", f"{goal:.6f}")
        page.click("#reach")
        assert self.approximated(page) == pytest.approx(goal, abs=1e-3)
        changed = np.abs(shares_of(page) - before).sum() / 2
        assert f"{100 * changed:.0f}"[:1] in page.text_content("#reached")
        # No further than to one task alone that reaches it.
        assert 0 < changed <= 1 - before.min()
        page.fill("#goal", "0.000001")
        page.click("#reach")
        assert "No mixture found" in page.text_content("#reached")
        page.fill("#goal", "")
        page.click("#reach")
        assert "such as 1.05" in page.text_content("#reached")

    def test_tables_can_be_downloaded(self, open_page, report):
        page = open_page(report)
        with page.expect_download() as download:
            page.click('[data-csv="compared"]')
        lines = download.value.path().read_text().splitlines()
        assert len(lines) == 5 and f"{report.row('chosen').loss:.4f}" in lines[2]


class TestEveryReader:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_no_rule_of_accessibility_is_broken(self, open_page, report, scheme):
        from axe_playwright_python.sync_playwright import Axe

        for width in WIDTHS:
            page = open_page(report, width=width, color_scheme=scheme, bypass_csp=True)
            found = Axe().run(page).response["violations"]
            assert [(rule["id"], rule["nodes"][0]["html"][:200]) for rule in found] == []

    @pytest.mark.parametrize("width", WIDTHS)
    def test_nothing_is_wider_than_the_page(self, open_page, width):
        page = open_page(report_on((9, 8, 7, 6, 5), names=HOSTILE), width=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    def test_hostile_names_are_text(self, open_page):
        hostile = report_on((9, 8, 7, 6, 5), names=HOSTILE)
        page = open_page(hostile)
        assert page.locator("img, iframe, object").count() == 0
        shown = page.locator("#task-table bdi").all_text_contents()
        assert set(shown) >= {HOSTILE[0], HOSTILE[1], HOSTILE[3], HOSTILE[4]}
        assert any("\\u202e" in name for name in shown)
        page.click("#set-all")
        page.locator("#mixture input[type=range]").nth(4).fill("40")
        again = open_page(hostile, hash=page.evaluate("location.hash"))
        assert shares_of(again) == pytest.approx(shares_of(page), abs=1e-3)
        assert page.title().startswith("Task selection: ")

    def test_many_tasks_can_be_searched(self, open_page):
        many = report_on((2,) * 80, verified=False)
        page = open_page(many)
        assert page.locator("#task-table tbody tr").count() == 60
        page.fill("#find", "task77")
        (found,) = page.locator("#found tbody tr").all()
        assert f"{many.row('all without task77').loss:.4f}" in found.text_content()


class TestWithoutABrowser:
    def test_a_page_holds_all_it_needs(self, report):
        page = report.to_html()
        assert not re.search(r'(src|href)="(?!#)', page)
        (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
        assert html.unescape(policy).startswith("default-src 'none'")
        (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
        assert json.loads(data)["weights"] == report.weights

    def test_a_report_without_estimates_has_a_page(self):
        fixed = SelectionReport(weights={"a": 1.0, "b": 0.0}, run={"after": "continue"})
        assert "Train on a alone, 1 of 2 tasks." in fixed.to_html()

    def test_titles(self):
        def title(**weights):
            return decision_title(
                SimpleNamespace(
                    weights=weights,
                    selected=[name for name, w in weights.items() if w],
                    difference=difference,
                )
            )

        difference = None
        assert title(a=0.5, b=0.5) == "Keep all 2 tasks."
        difference = SimpleNamespace(loss=-0.2)
        assert title(a=0.7, b=0.3) == "Keep all 2 tasks, with other shares."
        difference = SimpleNamespace(loss=0.0)
        assert title(a=0.5, b=0.5) == "Keep all 2 tasks."
        assert title(a=1.0, b=0.0) == "Train on a alone, 1 of 2 tasks."
        assert title(a=0.5, b=0.5, c=0.0) == "Train on 2 of 3 tasks: a and b."
        many = {f"t{k}": 0.1 for k in range(8)} | {"x": 0.0}
        assert title(**many) == "Train on 8 of 9 tasks: t0, t1, t2, t3, t4, t5 and 2 more."

    def test_a_loaded_report_has_the_same_page(self, report, tmp_path):
        report.save(tmp_path)
        assert (tmp_path / "index.html").read_text() == report.to_html()
        assert SelectionReport.load(tmp_path).to_html() == report.to_html()
