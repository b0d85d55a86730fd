"""A notebook goes on after its last valid checkpoint and comes to what it would have come to; what is not sure is run again."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aiexec.define.usecase import load_usecase
from aiexec.errors import RunFailed
from aiexec.run.kernels import WarmKernels
from aiexec.run.notebook import execute
from aiexec.run.resuming import checkpoints_for
from aiexec.run.runner import resume_run, run_pipeline
from aiexec.settings import load_settings

KEY = b"a key for the test"
STOP = "if __import__('os').path.exists('stop'): raise RuntimeError('stopped')\n"


def write(path: Path, *cells) -> Path:
    """Cells as sources, or as (source, tags)."""
    made = []
    for place, cell in enumerate(cells):
        source, tags = cell if isinstance(cell, tuple) else (cell, "")
        made.append({"cell_type": "code", "id": f"c{place}", "metadata": {"tags": tags.split()}, "source": source, "outputs": [],
                     "execution_count": None})
    about = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": made, "metadata": about, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def kernels():
    with WarmKernels() as opened:
        yield opened


@pytest.fixture
def attempt(tmp_path, kernels):
    """Execute the notebook of the test once more."""
    def run(parameters=None, outputs=None, inputs=None, use=True, **options):
        path = tmp_path / "nb.ipynb"
        used = checkpoints_for(path, parameters or {}, inputs or {}, tmp_path, tmp_path / "kept", KEY) if use else None
        done = execute(path, tmp_path / "out.ipynb", parameters, cwd=tmp_path, kernels=kernels, outputs=outputs, checkpoints=used,
                       timeout=120, **options)
        return done

    return run


def shown(path: Path) -> list:
    """What a reader sees of the code cells: numbers and outputs."""
    cells = json.loads((path / "out.ipynb").read_text(encoding="utf-8"))["cells"]
    return [(cell["execution_count"], cell["outputs"]) for cell in cells if cell["cell_type"] == "code"]


def states(done) -> list[str]:
    return [cell.status for cell in done.cells]


LIFE = [
    ("month: str = '2013-01'\nn: int = 3", "parameters"),
    "import random, os, sys, enum, functools, warnings\nimport numpy as np, pandas as pd\nfrom dataclasses import dataclass\n"
    "random.seed(1); np.random.seed(2)\nrng = np.random.default_rng(3)\nlimit = 0.5",
    "pd.set_option('display.precision', 3); np.set_printoptions(precision=2)\nos.environ['FLAG'] = 'on'; os.makedirs('deep', exist_ok=True)\n"
    "os.chdir('deep'); sys.path.insert(0, os.getcwd())\nwarnings.filterwarnings('ignore', message='quiet')",
    ("class Size(enum.Enum):\n    SMALL, LARGE = 1, 2\n\n@dataclass\nclass Row:\n    a: int\n    def above(self): return self.a > limit * n\n\n"
     "class Wide(Row):\n    def above(self): return super().above() or self.a == 0\n\n"
     "def fact(k): return k * fact(k - 1) if k else 1\n\ndef counter(start):\n    def count():\n        nonlocal start\n        start += 1\n"
     "        return start\n    return count\n\nnext_number = counter(5); next_number()\n"
     "steps = [lambda x: x + limit, functools.partial(pow, 2), fact]\n"
     "flights = pd.DataFrame({'x': rng.random(6), 'carrier': pd.Categorical(list('abcabc'))})\nalias = flights\n"
     "print('made', len(flights)); random.random()", "checkpoint"),
    STOP + "limit = 0.25\nrows = [Row(1), Wide(0), Row(2)]\n[r.above() for r in rows], random.random(), np.random.rand(3), rng.random(), next_number()",
    STOP + "with warnings.catch_warnings(record=True) as heard:\n    warnings.warn('quiet: nothing'); warnings.warn('loud')\n"
    "print([str(one.message) for one in heard])\nos.path.basename(os.getcwd()), os.environ['FLAG'], [f(2) for f in steps], Size.LARGE",
    ("import matplotlib.pyplot as plt\nfrom sklearn.linear_model import LinearRegression\nplt.rcParams['lines.linewidth'] = 4\n"
     "alias['y'] = flights.x * 2 + np.random.rand(6) / 9\nmodel = LinearRegression().fit(flights[['x']], flights.y)\nflights", "checkpoint"),
    STOP + "print(model.predict(alias[['x']])); plt.plot(flights.x);",
    STOP + "auc = float(np.random.rand()); alias is flights, fact.__globals__ is globals(), type(rows[1]).__mro__[1] is Row, Size(2) is Size.LARGE, n",
    ("auc: float", "outputs"),
]


@pytest.mark.parametrize("at, restored", [(4, 3), (5, 3), (7, 6), (8, 6)])
def test_an_interrupted_notebook_comes_to_the_same_end(tmp_path, attempt, at, restored):
    options = {"parameters": {"n": 4}, "outputs": {"auc": "float"}}
    write(tmp_path / "nb.ipynb", *LIFE)
    whole = attempt(**options, use=False)
    expected = shown(tmp_path)
    assert whole.status == "done", whole.error
    # the same code in each attempt: the stop comes from outside
    cells = [cell if place == at or isinstance(cell, tuple) else cell.replace("path.exists('stop')", "path.exists('none')")
             for place, cell in enumerate(LIFE)]
    for folder in (tmp_path, tmp_path / "deep"):
        (folder / "stop").touch()
    write(tmp_path / "nb.ipynb", *cells)
    stopped = attempt(**options)
    assert (stopped.status, stopped.error) == ("failed", "RuntimeError: stopped"), stopped
    for folder in (tmp_path, tmp_path / "deep"):
        (folder / "stop").unlink()
    done = attempt(**options)
    assert (done.status, done.notice) == ("done", ""), done
    assert done.restored == restored + 1 and states(done)[0] == "restored"  # parameters and all cells down to the checkpoint
    found = shown(tmp_path)
    for place, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == other, f"cell {place}"
    assert done.outputs == whole.outputs
    marks = [cell["source"] for cell in json.loads((tmp_path / "out.ipynb").read_text())["cells"] if cell["cell_type"] == "markdown"]
    assert "RESTORED" in "".join(marks[0])


def test_only_what_it_came_from_makes_it_valid(tmp_path, attempt):
    (tmp_path / "early.py").write_text("a = 1")
    (tmp_path / "late.py").write_text("b = 1")
    (tmp_path / "data.csv").write_text("x\n1\n")

    def cells(first="x = early.a + k", last="import late\nz = y + late.b"):
        write(tmp_path / "nb.ipynb", ("k: int = 1", "parameters"), f"import early\nrows = open('data.csv').read()\n{first}",
              ("y = x + 1", "checkpoint"), last)

    def restored(**options) -> int:
        done = attempt(**options)
        assert (done.status, done.notice) == ("done", ""), done
        return done.restored

    cells()
    assert (restored(), restored()) == (0, 3)
    cells(last="import late\nz = y * 5")
    assert restored() == 3
    (tmp_path / "late.py").write_text("b = 2")
    assert restored() == 3
    assert (restored(parameters={"k": 2}), restored(parameters={"k": 2})) == (0, 3)
    cells(first="x = early.a + k + 0")
    assert (restored(), restored()) == (0, 3)
    (tmp_path / "early.py").write_text("a = 2")
    assert (restored(), restored()) == (0, 3)
    (tmp_path / "data.csv").write_text("x\n2\n")
    assert (restored(), restored()) == (0, 3)
    assert (restored(inputs={"k": "0" * 64}, parameters={"k": 3}), restored(inputs={"k": "1" * 64}, parameters={"k": 3})) == (0, 0)


def test_a_later_cell_that_reads_more_has_the_cells_run_again(tmp_path, attempt):
    first = "import numpy as np\na, b = 1, np.zeros(3_000_000)"
    write(tmp_path / "nb.ipynb", first, ("c = a + len(b)", "checkpoint"), "print(c)")
    attempt()
    write(tmp_path / "nb.ipynb", first, ("c = a + len(b)", "checkpoint"), "print(c, a)")
    assert attempt().restored == 2, "what is small is kept in any case"
    write(tmp_path / "nb.ipynb", first, ("c = a + len(b)", "checkpoint"), "print(c, b[0])")
    done = attempt()
    assert done.restored == 0 and done.status == "done" and "read b now" in done.notice
    assert attempt().restored == 2
    write(tmp_path / "nb.ipynb", first, ("c = a + len(b)", "checkpoint"), "print(eval('b')[0])")
    assert attempt().restored == 2


def test_an_input_of_the_same_content_may_lie_elsewhere(tmp_path, attempt):
    write(tmp_path / "nb.ipynb", ("flights: str = ''", "parameters"), ("rows = 1", "checkpoint"), "print(flights, rows)")
    attempt(parameters={"flights": "runs/1/flights"}, inputs={"flights": "0" * 64})
    done = attempt(parameters={"flights": "runs/2/flights"}, inputs={"flights": "0" * 64})
    assert done.restored == 2 and shown(tmp_path)[-1][1][0]["text"] == ["runs/2/flights 1\n"]


@pytest.mark.parametrize("source, says", [
    ("import threading\nkept = threading.Lock()", "kept (lock): cannot pickle"),
    ("kept = open('log.txt', 'w')", "kept (TextIOWrapper): an open file"),
    ("kept = (x for x in range(3))", "kept (generator): cannot pickle"),
    ("import sqlite3\nconnection = sqlite3.connect(':memory:')\ndef kept(): return connection", "kept (function): cannot pickle"),
    ("class Odd:\n    def __reduce__(self): raise ValueError('never')\nkept = Odd()", "kept (Odd): never"),
    ("import ipywidgets\nkept = ipywidgets.IntSlider()", "half of which lives in the browser"),
])
def test_what_cannot_be_kept_is_named_and_the_run_goes_on(tmp_path, attempt, source, says):
    write(tmp_path / "nb.ipynb", (source, "checkpoint"), "kept is not None")
    done = attempt()
    assert done.status == "done" and says in done.notice and "tagged always" in done.notice
    assert not list((tmp_path / "kept").glob("*.state")) if (tmp_path / "kept").exists() else True


def test_cells_tagged_always_run_in_either_case(tmp_path, attempt):
    write(tmp_path / "nb.ipynb", ("import sqlite3\nbase = sqlite3.connect('base.db')\nopened = globals().get('opened', 0) + 1", "always"),
          "base.execute('create table if not exists t (a)'); base.execute('insert into t values (1)'); base.commit()\nheavy = 7",
          ("more = heavy + 1", "checkpoint"), STOP + "base.execute('select count(*) from t').fetchone(), more, opened")
    (tmp_path / "stop").touch()
    assert attempt().failure == "error in cell"
    (tmp_path / "stop").unlink()
    done = attempt()
    assert (done.notice, done.status, done.restored, states(done)) == ("", "done", 2, ["done", "restored", "restored", "done"])
    assert "((1,), 8, 1)" in str(shown(tmp_path)[-1])


def test_declared_variables_are_kept_alone(tmp_path, attempt):
    write(tmp_path / "nb.ipynb", ("# checkpoint: a\na, b = 1, (x for x in 'ab')", "checkpoint"), STOP + "a + 1")
    attempt()
    assert attempt().restored == 1
    record = json.loads(next((tmp_path / "kept").glob("*.json")).read_text())
    assert record["about"]["names"] == ["a"]


class Trap:
    """A pickle that leaves a trace when it is read."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


def test_a_swapped_or_damaged_file_is_never_read(tmp_path, attempt):
    write(tmp_path / "nb.ipynb", ("a = 1", "checkpoint"), "a + 1")
    trap = pickle.dumps(Trap(tmp_path / "trace"))

    def state() -> Path:
        return next((tmp_path / "kept").glob("*.state"))

    def record() -> Path:
        return next((tmp_path / "kept").glob("*.json"))

    def swapped():
        state().write_bytes(trap)

    def swapped_with_its_digest():
        import hashlib

        state().write_bytes(trap)
        said = json.loads(record().read_text())
        said["about"]["digest"] = hashlib.sha256(trap).hexdigest()
        record().write_text(json.dumps(said))

    def flipped():
        raw = bytearray(state().read_bytes())
        raw[len(raw) // 2] ^= 1
        state().write_bytes(raw)

    def cut():
        state().write_bytes(state().read_bytes()[:-9])

    def torn():
        record().write_text(record().read_text()[:40])

    def gone():
        state().unlink()

    attempt()
    for damage in (swapped, swapped_with_its_digest, flipped, cut, torn, gone):
        damage()
        done = attempt()
        assert (done.status, done.restored) == ("done", 0) and "was not used" in done.notice, damage.__name__
        assert not (tmp_path / "trace").exists()
        assert attempt().restored == 1, damage.__name__


def test_a_secret_is_never_in_a_checkpoint(tmp_path, attempt, monkeypatch):
    monkeypatch.setenv("TOKEN", "correct horse battery")
    write(tmp_path / "nb.ipynb", ("from aiexec import Secret\ntoken: Secret = Secret('env:TOKEN')", "parameters"),
          ("copy = token\nprint(token[:7] + token[7:])\nrows = 3", "checkpoint"), "len(token), len(copy), rows")
    attempt(secrets={"token": "env:TOKEN"})
    kept = [path.read_bytes() for path in (tmp_path / "kept").iterdir()]
    assert kept and not any(b"correct horse" in data or b"battery" in data for data in kept)
    done = attempt(secrets={"token": "env:TOKEN"})
    assert done.status == "done" and done.restored and "(21, 21, 3)" in str(shown(tmp_path)[-1])
    write(tmp_path / "nb.ipynb", ("from aiexec import Secret\ntoken: Secret = Secret('env:TOKEN')", "parameters"),
          ("url = f'db://me:{token}@host'", "checkpoint"), "len(url)")
    done = attempt(secrets={"token": "env:TOKEN"})
    assert done.status == "done" and "url (str): a secret" in done.notice
    assert not any(b"correct horse" in path.read_bytes() for path in (tmp_path / "kept").iterdir())


def test_only_the_newest_few_are_kept(tmp_path, attempt):
    for number in range(6):
        write(tmp_path / "nb.ipynb", (f"a = {number}", "checkpoint"), "a")
        attempt()
    assert len(list((tmp_path / "kept").glob("*.json"))) == len(list((tmp_path / "kept").glob("*.state"))) == 4


def test_a_killed_runner_leaves_what_was_kept(tmp_path, attempt):
    write(tmp_path / "nb.ipynb", "n = 1", ("n = n + 1", "checkpoint"), "open('begun', 'w').close()\nimport time, os\n"
          "time.sleep(0 if os.path.exists('go') else 60)\nn + 1")
    program = (f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from pathlib import Path; from aiexec.run.notebook import execute\n"
               f"from aiexec.run.resuming import checkpoints_for; d = Path({str(tmp_path)!r})\n"
               f"execute(d / 'nb.ipynb', d / 'out.ipynb', cwd=d, checkpoints=checkpoints_for(d / 'nb.ipynb', {{}}, {{}}, d, d / 'kept', {KEY!r}))")
    runner = subprocess.Popen([sys.executable, "-c", program])
    until = time.monotonic() + 90
    while not (tmp_path / "begun").exists():
        assert runner.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    (tmp_path / "go").touch()
    done = attempt()
    assert (done.status, done.restored) == ("done", 2), done


def test_a_step_of_a_pipeline_resumes_within_its_notebook(tmp_path):
    (tmp_path / "settings.ini").write_text("[aiexec]\nrecorder = none\n", encoding="utf-8")
    folder = tmp_path / "usecases" / "late"
    folder.mkdir(parents=True)
    (folder / "usecase.yaml").write_text(
        "name: late\ntitle: Late\ndepartment: operations\nowner: ops@example.org\nrisk: minimal\n"
        "success: [{metric: roc_auc, at_least: 0.6}]\n"
        "value: {currency: USD, true_positive: 1, false_positive: -1, false_negative: 0, true_negative: 0, cost_per_month: 1}\n"
        "pipeline:\n  train: {notebook: train.ipynb}\n", encoding="utf-8")
    write(folder / "train.ipynb", "fitted = 'for an hour'", ("model = fitted.upper()", "checkpoint"), "auc = len(modle)", ("auc: int", "outputs"))
    settings = load_settings(tmp_path)
    with pytest.raises(RunFailed, match="modle"):
        run_pipeline(load_usecase("late", settings), {}, settings=settings)
    write(folder / "train.ipynb", "fitted = 'for an hour'", ("model = fitted.upper()", "checkpoint"), "auc = len(model)", ("auc: int", "outputs"))
    run = next(path.name for path in (tmp_path / ".aiexec" / "runs").iterdir())
    done = resume_run(run, settings=settings)
    assert (done.status, done.steps["train"].outputs) == ("done", {"auc": 11})
    executed = json.loads(done.steps["train"].notebook.read_text(encoding="utf-8"))
    assert executed["metadata"]["aiexec"]["restored"] == 2
