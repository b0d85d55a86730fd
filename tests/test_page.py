"""An executed notebook as a page: whole, light, and harmless whatever the notebook shows."""

import json
import re
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

from aiexec.errors import NotebookError
from aiexec.run.kernels import WarmKernels
from aiexec.run.notebook import execute
from aiexec.run.page import page, write_page
from .test_checkpoints import write

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = """<script>document.title='owned'</script><img src=x onerror="document.title='owned'"><a id=link href="javascript:document.title='owned'">a</a>
<svg onload="document.title='owned'"><script>document.title='owned'</script></svg><iframe srcdoc="<script>top.document.title='owned'</script>"></iframe>
<meta http-equiv=refresh content="0;url=http://127.0.0.1:9/"><base href="http://127.0.0.1:9/"><link rel=stylesheet href="http://127.0.0.1:9/x.css">
<style>:host{position:fixed;inset:0;background:red}main{display:none}</style><style>@import 'http://127.0.0.1:9/y.css';</style>
<form action="http://127.0.0.1:9/"><input name=q autofocus></form></template></div></section></main><h1 style="background:url(http://127.0.0.1:9/z.png)">out</h1>
<details open ontoggle="document.title='owned'">x</details><object data="http://127.0.0.1:9/o"></object><b>seen</b>"""
PARAMETER = "</title><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> dict[str, Path]:
    """Three notebooks as the runner leaves them: done, failed and hostile."""
    folder, found = tmp_path_factory.mktemp("pages"), {}
    plot = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"
    table = "import pandas as pd\nflights = pd.DataFrame({'carrier': ['AA', 'B6'], 'late': [3, 4]}); flights"
    long = "for i in range(500): print('row', i)"
    sources = {
        "done": [("month: str = '2013-01'", "parameters"), table, plot, long, "print('\\x1b[31mred\\x1b[0m <b>')"],
        "failed": [("month: str = '2013-01'", "parameters"), table, "flights.lat", "print('never')"],
        "hostile": [("month: str = '2013-01'", "parameters"),
                    f"from IPython.display import HTML, Markdown, SVG, Javascript, display\nbad = {HOSTILE!r}\ndisplay(HTML(bad), Markdown(bad))",
                    "display(SVG('<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"9\" height=\"9\"><script>parent.document.title=\"owned\"</script></svg>'))",
                    "display(Javascript('document.title=\"owned\"'))\nprint(bad)", "raise ValueError(bad)"]}
    with WarmKernels() as kernels:
        for name, cells in sources.items():
            write(folder / f"{name}.ipynb", *cells)
            execute(folder / f"{name}.ipynb", folder / f"{name}-out.ipynb", {"month": PARAMETER if name == "hostile" else "2013-04"}, cwd=folder,
                    kernels=kernels)
            found[name] = write_page(folder / f"{name}-out.ipynb")
    return found


def test_a_page_holds_all_and_loads_nothing(executed):
    html = executed["done"].read_text(encoding="utf-8")
    assert "2013-04" in html and "<td>B6</td>" in html and "data:image/png;base64," in html
    assert "470 more lines" in html and '<span class="a1">red</span> &lt;b&gt;' in html
    assert re.search(r'class="pill ">done', html) and "CPU" in html
    assert "<script" not in html and not re.search(r'(?:src|href)="(?!data:|#)', html)


def test_a_page_without_outputs_is_light():
    assert len(page({"cells": [], "metadata": {}}, "empty")) < 10_000


def test_a_failure_comes_first_and_leads_to_its_cell(executed):
    html = executed["failed"].read_text(encoding="utf-8")
    head = html[: html.index("<main>")]
    assert "error in cell" in head and "AttributeError" in head and 'href="#cell-3"' in head
    assert 'class="code failed" id="cell-3"' in html and 'class="code idle" id="cell-4"' in html


def test_what_is_no_notebook_is_refused(tmp_path):
    for text in ("", "[]", "{}", '{"cells": [{"cell_type": "code"}], "metadata": {}}'):
        (tmp_path / "x.ipynb").write_text(text)
        with pytest.raises(NotebookError, match="cannot be read as a notebook"):
            write_page(tmp_path / "x.ipynb")
    assert not (tmp_path / "x.html").exists()


def test_odd_but_valid_notebooks_have_a_page(tmp_path):
    cells = [{"cell_type": "raw", "metadata": {}, "source": "raw"}, {"cell_type": "markdown", "metadata": {}, "source": ["# a\n", "\ud800 \x00"]},
             {"cell_type": "code", "metadata": {"tags": []}, "source": "%%bash\necho", "execution_count": None, "outputs": [
                 {"output_type": "display_data", "metadata": {}, "data": {}}, {"output_type": "stream", "name": "stdout", "text": "x" * 3_000_000},
                 {"output_type": "display_data", "metadata": {}, "data": {"application/json": {"a": [1]}, "text/plain": "{}"}},
                 {"output_type": "error", "ename": "E", "evalue": "v", "traceback": []}]}]
    (tmp_path / "odd.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 2}))
    written = write_page(tmp_path / "odd.ipynb")
    assert written.stat().st_size < 300_000 and "more characters are in the notebook" in written.read_text(encoding="utf-8")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_shows_it_and_nothing_hostile_happens(executed):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--no-first-run"])
        for name, path in executed.items():
            asked, tab = [], browser.new_page(viewport={"width": 1000, "height": 800})
            tab.on("request", lambda request: asked.append(request.url))
            tab.goto(path.as_uri())
            tab.wait_for_timeout(200)
            assert tab.title() == name and tab.url == path.as_uri()
            assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
            assert tab.locator("main").is_visible() and tab.locator("header h1").is_visible()
            # nothing lies over the head, whatever style an output brings
            box = tab.locator("header h1").bounding_box()
            top = tab.evaluate("([x, y]) => document.elementFromPoint(x, y).closest('header') !== null", [box["x"] + 5, box["y"] + box["height"] / 2])
            assert top, name
        assert tab.get_by_text("seen", exact=True).count() >= 1
        browser.close()
