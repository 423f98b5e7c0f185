"""The page: its structure, untrusted texts, and what a browser makes of it."""

import gzip
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from src.evaluation.record import Record
from src.report.page import PLOTLY, report_of
from src.runs.files import write_json
from tests.report.simulated import protocol, write_run, write_sweep

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "img", "input", "br"}


class Parsed(HTMLParser):
    """A page as elements; checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}>"
        assert self.open.pop() == tag, f"</{tag}>"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data.strip())

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "sweep"
    values = {
        "schedule": ["linear", "cosine"],
        "parameterization": ["eps", "v"],
        "seed": [0, 1],
        "picture": [True],
    }
    write_sweep(folder, **values)
    run = folder / "0_schedule-linear_parameterization-eps_seed-0"
    for steps in (10, 20):
        record = Record(
            {"fd_digits": 90 / steps}, protocol(recipe__steps=steps, recipe__network_evaluations=steps)
        )
        record.write(run / "scores" / f"ddim-{steps}" / "scores.json")
    return folder


@pytest.fixture(scope="module")
def page(sweep):
    return report_of([sweep], sweep.parent / "report.html")


def test_the_page_is_one_file_without_network(page):
    text = page.read_text()
    parsed = Parsed(text)
    for _, attributes in parsed.elements:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/")), attributes
        assert not any(name.startswith("on") for name in attributes), "no inline handlers"
    policy = next(a["content"] for a in parsed.of("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "http" not in policy
    nonces = {a["nonce"] for a in parsed.of("script") if "nonce" in a}
    assert len(nonces) == 1
    assert f"'nonce-{nonces.pop()}'" in policy
    assert not re.search(r"@import|url\(", text.partition("</style>")[0])


def test_the_page_answers_the_question(page):
    parsed = Parsed(page.read_text())
    text = " ".join(parsed.texts)
    assert "schedule × parameterization × steps: 8 runs" in text
    assert "What matters" in text
    ids = [a["id"] for _, a in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    sections = ("question", "answer", "scores", "evaluations", "curves", "samples", "cost", "protocols")
    assert set(sections) <= set(ids)
    assert {a["href"][1:] for a in parsed.of("a")} <= set(ids), "every link leads somewhere"
    assert len(parsed.of("img")) == 8
    assert all(a["alt"] for a in parsed.of("img"))
    assert sum(a.get("class") == "card" for a in parsed.of("details")) == 10


def test_every_figure_is_json_without_numbers_that_json_lacks(page):
    figures = re.findall(r'<script type="application/json">(.*?)</script>', page.read_text(), re.DOTALL)
    assert len(figures) > 10

    def refuse(name):
        raise AssertionError(name)

    assert all(json.loads(text, parse_constant=refuse)["data"] for text in figures)


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{7*7}}"


def test_untrusted_texts_stay_texts(tmp_path):
    evil = protocol(recipe__sampler=EVIL, recipe__guidance='"><b onmouseover=alert(3)>')
    for name in ("a", "b"):
        run = write_run(tmp_path / name, name=f"{name} {EVIL}", schedule___target_=f"{name}.{EVIL}")
        Record({f"fd_{EVIL}": 4.0, "fd_digits": 3.0}, evil).write(run / "scores.json")
        write_json(run / "environment.json", {"gpus": [EVIL], "git": EVIL})
    text = report_of([tmp_path], tmp_path / "report.html").read_text()
    parsed = Parsed(text)
    assert not any(name.startswith("on") for _, a in parsed.elements for name in a)
    assert not any(a.get("src") == "x" for a in parsed.of("img"))
    assert len([a for a in parsed.of("script") if "nonce" in a]) == 1
    assert "49" not in {word.strip() for word in parsed.texts}
    for figure in re.findall(r'<script type="application/json">(.*?)</script>', text, re.DOTALL):
        assert "<" not in figure
        json.loads(figure)


def test_a_page_of_a_single_run_a_failed_one_and_a_damaged_one(tmp_path):
    write_run(tmp_path / "one")
    text = report_of([tmp_path / "one"], tmp_path / "one.html").read_text()
    assert "One result; nothing is compared." in text
    failed = write_run(tmp_path / "two", score=None, schedule___target_="src.diffusion.schedule.Linear")
    write_json(failed / "error.json", {"error": "the loss is not finite"})
    (write_run(tmp_path / "three", picture=True) / "samples" / "step_00000300.png").write_bytes(
        b"\x89PNG broken"
    )
    (tmp_path / "three" / "scores.json").write_text("{")
    (tmp_path / "three" / "csv" / "version_0" / "metrics.csv").write_bytes(b"step,a\n1,\xff\xfe\n,,,\n\x00")
    text = report_of([tmp_path], tmp_path / "all.html").read_text()
    assert "the loss is not finite" in text
    assert "1 file could not be read" in text


def test_a_score_in_the_table_has_its_interval_and_its_warning(tmp_path):
    for name, low in (("symmetric", 4.9), ("other", 4.6)):
        intervals = {"fd_digits": [low, 5.3]}
        record = Record({"fd_digits": 5.1}, protocol(), intervals=intervals, warnings=["rank-deficient"])
        record.write(write_run(tmp_path / name) / "scores.json")
    text = re.sub(r"\s+", " ", report_of([tmp_path], tmp_path / "a.html").read_text())
    assert '5.10 <span class="interval">± 0.20</span>' in text
    assert '5.10 <span class="interval">[4.60, 5.30]</span>' in text
    assert '<abbr title="rank-deficient">!</abbr>' in text
    figure = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text)[1])
    bars = [trace["error_x"] for trace in figure["data"]]
    assert all(each["visible"] for each in bars)
    assert [each["array"][0] for each in bars] == pytest.approx([0.2, 0.2])
    assert sorted(each["arrayminus"][0] for each in bars) == pytest.approx([0.2, 0.5])


def test_the_plotting_library_is_the_published_one():
    digest = hashlib.sha256(gzip.decompress(PLOTLY.read_bytes())).hexdigest()
    assert digest == "99784e3abfb07b142a15e521a439e6d9addceadb3f79553fd24c72774f0649ba"
    assert "MIT" in (PLOTLY.parent / "LICENSE").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name runs, sweeps or records"),
        (["runs", "oout=a.html"], "oout: no such option; did you mean out?"),
        (["runs", "out=a.pdf"], "out=a.pdf: give an HTML file"),
        (["gone"], "gone: no such file or folder"),
        (["run", "score=fid"], "score=fid: no such score; there is fd_digits"),
    ],
)
def test_mistakes_are_one_line(tmp_path, command, capsys, arguments, words):
    write_run(tmp_path / "run")
    assert command("report.__main__", *arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_the_command_writes_the_page(tmp_path, command, capsys):
    write_run(tmp_path / "run")
    assert command("report.__main__", "run") == 0
    assert (tmp_path / "report.html").stat().st_size < 1e6
    assert "report.html" in capsys.readouterr().out


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium of the system, driven by playwright, whose own browsers are not downloaded."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["desktop", "phone"])
def test_a_browser_draws_the_page_and_opens_a_card(browser, page, tmp_path, width, height):
    context = browser.new_context(viewport={"width": width, "height": height}, offline=True)
    tab = context.new_page()
    errors, requests = [], []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on(
        "console",
        lambda message: errors.append(message.text) if message.type in ("error", "warning") else None,
    )
    tab.on("requestfailed", lambda request: errors.append(request.url))
    tab.on("request", lambda request: requests.append(request.url))
    tab.goto(page.as_uri())
    # all of them, also those below, which are drawn while the page is idle
    tab.wait_for_selector(".canvas:not([data-drawn=yes])", state="detached")

    card = tab.locator("details.card").first
    assert not card.locator("table").first.is_visible()
    tab.locator("td.num a").first.click()
    opened = tab.locator("details.card[open]")
    assert opened.count() == 1
    assert opened.get_by_text("num_images").is_visible()

    tab.evaluate(
        "document.activeElement.blur(); window.getSelection().removeAllRanges(); window.scrollTo(0, 0)"
    )
    for _ in range(60):  # by keyboard
        tab.keyboard.press("Tab")
        if tab.evaluate("document.activeElement.matches('#scores thead button')"):
            break
    else:
        pytest.fail("the heads of the table cannot be reached by keyboard")
    tab.keyboard.press("Enter")
    runs = tab.locator("#scores tbody").first.locator("th").all_inner_texts()
    assert runs == sorted(runs, key=int)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "no sideways scrolling of the page"
    assert tab.evaluate("document.querySelectorAll('.scatterlayer .trace').length") > 20
    picture = tmp_path / "page.png"
    tab.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 50_000
    assert errors == []
    assert all(url.startswith(("file:", "data:", "blob:")) for url in requests)
    context.close()


def test_nothing_outside_a_run_folder_is_shown(tmp_path):
    run = write_run(tmp_path / "runs" / "a", picture=True)
    write_run(tmp_path / "runs" / "b")
    outside = tmp_path / "outside"
    Record({"fd_secret": 1.0}, protocol()).write(outside / "scores.json")
    (run / "scores").mkdir()
    (run / "scores" / "linked").symlink_to(outside)
    (run / "samples" / "step_00000400.png").symlink_to(tmp_path / "secret.png")
    shutil.copy(run / "samples" / "step_00000300.png", tmp_path / "secret.png")
    text = report_of([tmp_path / "runs"], tmp_path / "report.html").read_text()
    assert "fd_secret" not in text
    assert "data:image" not in text.replace("img-src data:", "")
    assert "2 files could not be read" in text


def test_a_page_of_fifty_runs_loads_within_two_seconds_and_prints(browser, tmp_path, command):
    for number in range(50):
        write_run(tmp_path / "runs" / f"run{number}", score=5 + number / 10, picture=True, seed=number)
    assert command("report.__main__", "runs", "out=page.html") == 0
    context = browser.new_context(offline=True)
    tab = context.new_page()
    tab.goto((tmp_path / "page.html").as_uri(), wait_until="load")
    times = tab.evaluate("performance.getEntriesByType('navigation')[0].toJSON()")
    assert 0 < times["loadEventStart"] < 2000
    printed = tab.pdf()
    assert printed.startswith(b"%PDF")
    assert len(printed) > 50_000
    context.close()
