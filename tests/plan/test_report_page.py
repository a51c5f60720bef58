"""The page of a plan: well-formed, self-contained, nothing from the user taken for markup."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fluidsched as fs
from fluidsched import planning
from fluidsched.errors import InputError

NASTY = """<script>alert("1")</script> & 'x' </td></html>"""
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Reads a page, checks that tags close in order, and keeps tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def result() -> planning.Plan:
    """A plan whose every name would be markup if it were not escaped."""
    workload = fs.Workload(
        [fs.RequestType(f"{NASTY} {k}", 3.0, 100 + k, 50) for k in range(2)], name=f"mix {NASTY}"
    )
    server = fs.Server(
        20_000,
        fs.IterationTime.affine(0.02, 1e-5, 1e-5, 1e-7),
        max_batch_size=16,
        name=f"gpu {NASTY}",
        source=NASTY,
    )
    return fs.plan(workload, server, horizon=120.0, replications=3)


@pytest.fixture(scope="module")
def written(result: planning.Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan's directory."""
    return result.write(tmp_path_factory.mktemp("plan") / "run")


@pytest.fixture(scope="module")
def text(written: Path) -> str:
    return (written / "report.html").read_text(encoding="utf-8")


def test_tags_close_in_order_and_there_is_one_of_each_landmark(text: str) -> None:
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    for tag in ("html", "head", "title", "body", "h1"):
        assert page.count(tag) == 1, tag
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert ("html", {"lang": "en"}) in page.tags
    assert any(attributes.get("name") == "viewport" for tag, attributes in page.tags if tag == "meta")


def test_nothing_from_the_user_is_markup_and_all_of_it_is_shown(text: str) -> None:
    page = Page(text)
    assert page.count("script") == 0
    for name in (f"mix {NASTY}", f"gpu {NASTY}", f"{NASTY} 0", f"{NASTY} 1"):
        assert name in page.text


def test_the_page_needs_no_network_and_no_script(text: str) -> None:
    """Pictures are PNG inside the page; nothing else is referred to."""
    page = Page(text)
    sources = [
        value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")
    ]
    assert len(sources) == 4  # gains, load curve, latencies, occupancy
    for source in sources:
        assert source is not None
        head, _, data = source.partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data, validate=True).startswith(b"\x89PNG\r\n\x1a\n")
    assert not re.search(r"@import|url\(|https?://", text)
    assert "@media print" in text
    assert "@media (max-width" in text


def test_the_page_answers_recommends_and_says_what_it_rests_on(result: planning.Plan, text: str) -> None:
    """What the terminal says, the page says: answer, recommendation, gains, every policy, seed and versions."""
    page = Page(text)
    found = result.recommendation
    for sentence in (*result.remarks, found.reason, found.stock_sentence(), *found.reach.lines(found.policy)):
        assert sentence in page.text
    assert found.engine_command is not None
    for words in (found.engine_command, "seed 7", "3 independent arrival paths", fs.show_versions()):
        assert words in page.text
    for table in result.tables:
        assert f"PolicyTable '{table.name}'" in page.text
    cells = [cell for rows in result.comparison.tables() for row in rows for cell in row]
    for gain in found.gains:
        cells.append(str(gain).strip())
    assert all(cell in page.text for cell in cells)


def test_jupyter_shows_the_answer_the_recommendation_and_the_comparison(result: planning.Plan) -> None:
    page = Page(result._repr_html_())
    assert page.count("script") == 0
    assert all(remark in page.text for remark in result.remarks)
    assert result.recommendation.reason in page.text
    assert page.count("table") >= 2
    assert result.recommendation.to_latex().startswith(r"\begin{tabular}")


def test_the_page_of_a_directory_holds_the_directory_s_own_pictures(written: Path, text: str) -> None:
    for picture in written.glob("*.png"):
        assert base64.b64encode(picture.read_bytes()).decode() in text


def test_a_replay_without_curve_has_its_page(tmp_path: Path) -> None:
    path = fs.ArrivalPath.from_arrays(
        [0.5 * k for k in range(30)], [64] * 30, [10 + k % 3 for k in range(30)]
    )
    text = fs.report(fs.plan(path, replay=True, curve=False), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text
    page = Page(text)
    assert page.count("img") == 2
    assert "replayed once" in page.text


def test_anything_but_a_plan_is_refused() -> None:
    with pytest.raises(InputError, match="plan"):
        fs.report("plan.json")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(text: str, tmp_path: Path, width: int) -> None:
    """In headless Chromium, where there is one: the page is as wide as the window, wide tables scroll inside."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium here")
    script = (
        "<script>document.title = document.documentElement.scrollWidth + '/' + window.innerWidth</script>"
    )
    (tmp_path / "page.html").write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
    done = subprocess.run(
        [
            *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = re.search(r"<title>(\d+)/(\d+)</title>", done.stdout)
    assert found, done.stderr
    assert int(found[1]) <= int(found[2])
