"""The page in a real browser: it is drawn, every picture loads, and it fits a laptop and a phone."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from icons.report.build import Chosen, Pool, build
from icons.report.page import render
from icons.store import ScoreStore

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium (scripts/test.sh does)"),
]

MEASURE = """<!doctype html><body style="margin:0">
<iframe style="border:0;width:{width}px;height:3000px" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => {{
const page = document.querySelector("iframe").contentDocument;
document.title = JSON.stringify({{
  width: page.documentElement.scrollWidth, height: page.documentElement.scrollHeight,
  images: page.images.length, broken: [...page.images].filter(image => !image.naturalWidth).length,
  sections: page.querySelectorAll("section").length}}) }})</script>"""


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    def run(*words: str) -> str:
        assert CHROMIUM is not None
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    return run


@pytest.fixture(scope="module")
def page_html(scores: ScoreStore, chosen: Chosen, pool: Pool, results_file: Path, validation_file: Path) -> str:
    page = build(scores, chosen, pool, comparison_file=results_file, validation_file=validation_file)
    return render(page).replace('loading="lazy"', "")  # so that all pictures are there when they are counted


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window_and_loads_every_picture(
    width: int, page_html: str, browse: Callable[..., str], tmp_path: Path
) -> None:
    frame = tmp_path / "frame.html"
    frame.write_text(MEASURE.format(width=width, page=html.escape(page_html)), encoding="utf-8")
    shown = browse("--virtual-time-budget=10000", "--dump-dom", frame.as_uri())
    measured = json.loads(html.unescape(re.findall(r"<title>(.*?)</title>", shown)[0]))
    assert measured["width"] == width
    assert measured["height"] > 3000
    assert measured["sections"] == 10
    assert measured["images"] > 25 and measured["broken"] == 0


def test_the_page_is_drawn(page_html: str, browse: Callable[..., str], tmp_path: Path) -> None:
    path, shot = tmp_path / "report.html", tmp_path / "report.png"
    path.write_text(page_html, encoding="utf-8")
    browse("--window-size=1280,2400", f"--screenshot={shot}", path.as_uri())
    with Image.open(shot) as image:
        assert image.size == (1280, 2400)
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24)}
    paper, bar = (253, 253, 252), (31, 95, 139)
    assert colours[paper] > 0.5 * 1280 * 2400
    assert colours[bar] > 5000, "the selected parts of the bars"
    assert len(colours) > 200
