"""A notebook called as a function: from scripts, threads and running event loops, inside a project and without one."""

import asyncio
import inspect
import json
import pydoc
import subprocess
import sys
import threading
from pathlib import Path

import pandas as pd
import pytest

from aiexec import notebook
from aiexec.errors import NotebookError, ParameterError, RunFailed
from aiexec.run.result import Picture

SCORE = {
    "parameters": "month: str  # of the flights\ndepth: int = 4  # of each tree\nrate: float = 0.1\nflights: 'Path | None' = None",
    "work": "import os, pandas as pd, matplotlib.pyplot as plt\nfrom pathlib import Path\n"
            "if depth > 8:\n    raise ValueError(f'{depth} is too deep')\n"
            "rows = pd.read_parquet(flights) if flights else pd.DataFrame({'late': [0, 1] * depth})\n"
            "auc, count = depth * rate, len(rows)\nplace = os.getcwd()\n"
            "curve, ax = plt.subplots()\nax.plot([0, 1], [0, auc]);",
    "outputs": "auc: float  # on the hold-out\ncount: int\nplace: str\nrows: pd.DataFrame\ncurve: plt.Figure",
}


def write(path: Path, cells: dict[str, str]) -> Path:
    made = [{"cell_type": "code", "id": tag, "metadata": {"tags": [tag]}, "source": source, "outputs": [], "execution_count": None}
            for tag, source in cells.items()]
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def score(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return notebook(write(folder / "score.ipynb", SCORE), output=folder / "calls")


def calls(function) -> list[Path]:
    return sorted(function.output.glob("*")) if function.output.exists() else []


def test_it_shows_what_it_takes_and_gives(score):
    assert list(inspect.signature(score).parameters) == ["month", "depth", "rate", "flights"]
    assert inspect.signature(score).parameters["depth"].annotation is int
    shown = pydoc.plain(pydoc.render_doc(score))
    assert "of each tree" in shown and "on the hold-out" in shown and "auc: float" in shown
    assert "score(month: str, depth: int = 4" in repr(score)
    assert "on the hold-out" in score._repr_html_()


def test_a_call_gives_its_outputs_as_attributes(score):
    r = score("2013-04", rate=0.5)
    assert (r.auc, r.count, r.place) == (2.0, 8, str(score.path.parent))
    assert isinstance(r.rows, pd.DataFrame) and len(r.rows) == 8
    assert isinstance(r.curve, Picture) and "image/svg+xml" in r.curve._repr_mimebundle_()
    executed = json.loads(r.path.read_text(encoding="utf-8"))
    assert executed["metadata"]["papermill"]["parameters"]["month"] == "2013-04" and r.seconds > 0
    assert r.parameters["depth"] == 4 and {"auc", "rows"} <= set(dir(r))
    with pytest.raises(AttributeError, match="Did you mean 'auc'"):
        r.acu


@pytest.mark.parametrize("given, named, says", [
    ((), {}, "needs a value for month"), (("2013-04",), {"month": "2013-05"}, "given twice"),
    ((1, 2, 3, 4, 5), {}, "takes 4 parameters, not 5"), (("2013-04",), {"dept": 4}, "Did you mean 'depth'"), (("2013-04", "4"), {}, "depth"), ((4,), {}, "month"),
    (("2013-04",), {"rate": float("nan")}, "rate"), (("2013-04",), {"depth": 4.5}, "depth"), (("2013-04",), {"depth": True}, "depth"),
])
def test_what_does_not_fit_is_refused_before_anything_starts(score, given, named, says):
    before = calls(score)
    with pytest.raises(ParameterError, match=says):
        score(*given, **named)
    assert calls(score) == before


def test_one_call_that_does_not_fit_has_none_of_them_start(score):
    before = calls(score)
    with pytest.raises(ParameterError, match="depth"):
        score.map([("2013-04", 1), ("2013-04", "2")])
    with pytest.raises(ParameterError, match="Did you mean 'depth'"):
        score.grid(month=["2013-04"], dept=[1, 2])
    assert calls(score) == before


def test_a_frame_is_handed_over_as_a_file(score):
    frame = pd.DataFrame({"late": [1, 0, 1], "when": pd.to_datetime(["2013-04-01"] * 3)})
    r = score("2013-04", flights=frame)
    assert r.count == 3 and r.rows.equals(frame)


def test_a_failure_names_the_cell_and_keeps_the_notebook(score):
    with pytest.raises(RunFailed, match=r"score.ipynb failed in cell 2: ValueError: 9 is too deep\. Look at .*notebook\.ipynb") as failed:
        score("2013-04", 9)
    assert "too deep" in failed.value.path.read_text(encoding="utf-8") and failed.value.execution.failure == "error in cell"


def test_it_works_within_a_running_loop_and_on_threads(score):
    async def within() -> float:
        return score("2013-04", 2).auc

    assert asyncio.run(within()) == pytest.approx(0.2)
    found = []
    threads = [threading.Thread(target=lambda depth=depth: found.append(score("2013-04", depth).count)) for depth in (1, 2, 3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(found) == [2, 4, 6]


def test_many_calls_run_side_by_side_and_none_is_lost_for_one_that_fails(score):
    several = score.map([("2013-04", depth) for depth in (1, 2, 3)], jobs=3)
    assert [one.count for one in several] == [2, 4, 6]
    assert list(several.frame()["depth"]) == [1, 2, 3] and "<table" in several._repr_html_()
    assert len({one.path for one in several}) == 3
    with pytest.raises(RunFailed, match="1 of 3 calls failed; .*9 is too deep") as failed:
        score.grid(month=["2013-04"], depth=[2, 9, 3], jobs=2)
    assert [one and one.count for one in failed.value.results] == [4, None, 6]


def test_an_edited_notebook_is_read_again(tmp_path):
    twice = notebook(write(tmp_path / "twice.ipynb", {"parameters": "a: int = 1", "work": "b = 2 * a", "outputs": "b: int"}), output=tmp_path / "c")
    assert twice(a=2).b == 4
    write(tmp_path / "twice.ipynb", {"parameters": "a: int = 1\nby: int = 3", "work": "b = by * a", "outputs": "b: int"})
    assert twice(a=2, by=5).b == 10 and "by" in inspect.signature(twice).parameters


def test_a_notebook_that_is_none_is_refused(tmp_path):
    (tmp_path / "torn.ipynb").write_text('{"cells": [', encoding="utf-8")
    for path in (tmp_path / "torn.ipynb", tmp_path / "missing.ipynb"):
        with pytest.raises(NotebookError):
            notebook(path)


def test_within_a_project_the_library_is_found_and_the_files_stay_there(tmp_path):
    (tmp_path / "settings.ini").write_text("[aiexec]\n", encoding="utf-8")
    (tmp_path / "features.py").write_text("def doubled(a): return 2 * a\n", encoding="utf-8")
    (tmp_path / "work").mkdir()
    write(tmp_path / "work" / "twice.ipynb", {"parameters": "a: int = 1", "work": "from features import doubled\nb = doubled(a)", "outputs": "b: int"})
    # a relative path and another working folder, as a script has them
    program = "from aiexec import notebook; r = notebook('work/twice.ipynb')(a=4); print(r.b, r.path)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    b, path = done.stdout.split()
    assert b == "8" and Path(path).is_relative_to(tmp_path / ".aiexec" / "calls" / "twice")


def test_the_import_is_light():
    program = ("import sys; from aiexec import notebook; heavy = [m for m in ('pandas', 'nbformat', 'papermill', 'jupyter_client', 'sqlalchemy')"
               " if m in sys.modules]; assert not heavy, heavy")
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
