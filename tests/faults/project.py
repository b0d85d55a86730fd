"""A tiny project whose run has one right result, and the questions that are asked after each fault."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import yaml

from aiexec.data.datasets import DATASETS
from aiexec.govern.audit import verify_chain
from aiexec.run.proof import verify_run
from aiexec.run.runner import RUNS, STEPS
from aiexec.settings import load_settings
from aiexec.store import Ledger, open_ledger

AIEXEC = Path(sys.executable).with_name("aiexec")
RAN = "import os, pathlib\nwith open(pathlib.Path(os.environ['AIEXEC_ROOT']) / 'ran.log', 'a') as log:\n" \
      "    log.write(f\"{os.environ.get('AIEXEC_RUN', '-')} {os.environ.get('AIEXEC_STEP', '-')} {os.getpid()}\\n\")"
SLOW = "import time\ntime.sleep(float(os.environ.get('SLOW', 0)))"
CELLS = {
    "make": [("parameters", "month: str = '2013-04'\nn: int = 40"), ("", RAN),
             ("", "import pandas as pd\nflights = pd.DataFrame({'late': [i % 2 for i in range(n)]})\nrows = n\nprint(rows)"),
             ("outputs", "flights: 'pd.DataFrame'\nrows: int")],
    "count": [("parameters", "month: str = '2013-04'\nflights: 'Dataset' = 'make.flights@2013-04'"), ("", RAN), ("", SLOW),
              ("", "import pandas as pd\nlate = int(pd.read_parquet(flights)['late'].sum())\nprint(late)"),
              ("outputs", "late: int")],
    "report": [("parameters", "month: str = '2013-04'\nlate: int = 0"), ("", RAN),
               ("", "text = f'{late} late in {month}'\nprint(text)"), ("outputs", "text: str")],
}
PIPELINE = {"make": {"notebook": "make.ipynb"}, "count": {"notebook": "count.ipynb", "with": {"flights": "make.flights"}},
            "report": {"notebook": "report.ipynb", "with": {"late": "count.late"}}}
FACTS = {"name": "late", "title": "Late flights", "department": "operations", "owner": "ada@example.org", "risk": "minimal",
         "success": [{"metric": "roc_auc", "at_least": 0.6}], "pipeline": PIPELINE,
         "value": {"currency": "USD", "true_positive": 1, "false_positive": 0, "false_negative": 0, "true_negative": 0}}


def lay_out(root: Path, recorder: str = "none", kernels: str = "cold", cells: dict = CELLS, **step: object) -> Path:
    """Make the project: three notebooks wired by name, each step with some more words; nothing has run in it yet."""
    folder = root / "usecases" / "late"
    folder.mkdir(parents=True)
    (root / "settings.ini").write_text(f"[aiexec]\nrecorder = {recorder}\nkernels = {kernels}\nactor = ada\n", encoding="utf-8")
    (root / "ran.log").touch()
    facts = {**FACTS, "pipeline": {name: {**one, **step} for name, one in PIPELINE.items() if name in cells}}
    (folder / "usecase.yaml").write_text(yaml.safe_dump(facts, sort_keys=False), encoding="utf-8")
    for step, sources in cells.items():
        write_notebook(folder / f"{step}.ipynb", sources)
    return root


def write_notebook(path: Path, sources: list[tuple[str, str]]) -> None:
    """A notebook of code cells, each with its tag or ''."""
    made = [nbformat.v4.new_code_cell(source, id=f"c{number}", metadata={"tags": [tag] if tag else []})
            for number, (tag, source) in enumerate(sources)]
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)


def environment(root: Path, **more: str) -> dict[str, str]:
    """What a command of this project runs in: its own temporary folder, and nothing of a surrounding project."""
    (root / "tmp").mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AIEXEC_") or name == "AIEXEC_RUNTIME"}
    return {**kept, "AIEXEC_ROOT": str(root), "TMPDIR": str(root / "tmp"), "HOME": str(root / "tmp"), **more}


def command(root: Path, *words: object, before: tuple = (), timeout: float = 240, **more: str) -> subprocess.CompletedProcess:
    """One command as a person would type it, to its end."""
    with started(root, *words, before=before, **more) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for number, _ in processes(root):
                os.kill(number, signal.SIGKILL)
            process.kill()
            out, err = process.communicate()
            err += f"\nnot ended within {timeout:g} s"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def started(root: Path, *words: object, before: tuple = (), **more: str) -> subprocess.Popen:
    """A command that has begun."""
    return subprocess.Popen([*map(str, before), AIEXEC, *map(str, words)], cwd=root, env=environment(root, **more), text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, errors="replace")


RUN = ("run", "late", "-p", "month", "2013-05")


def rough(done: subprocess.CompletedProcess) -> list[str]:
    """What is wrong with how a command refuses: it says one sentence and what to do, and ends with 1."""
    said = done.stderr + done.stdout
    found = [f"it ended with {done.returncode}"] if done.returncode != 1 else []
    found += ["a traceback"] if "Traceback" in said else []
    found += ["an error of ours"] if "Unexpected" in said else []
    found += ["no sentence"] if not any(line.startswith("Error: ") for line in said.splitlines()) else []
    return [f"{', '.join(found)}: {said[-600:]}"] if found else []


@dataclass(frozen=True)
class Outcome:
    """How one case went."""

    ok: bool
    says: str = ""  # what is wrong when it is not well, or where the fault struck
    struck: bool = True  # False: the command ended before the fault came
    facts: dict = field(default_factory=dict)  # figures: seconds, kills


def ledger_of(root: Path) -> Ledger:
    return open_ledger(load_settings(root))


def known(root: Path) -> Counter:
    """How often each step of each run stands in the ledger as done; read without touching it."""
    path = root / ".aiexec" / "ledger.db"
    if not path.exists() or not path.stat().st_size:
        return Counter()
    # a copy with its journal: opening the database itself would roll a torn transaction back for the command to come
    look = root / "tmp" / "look"
    shutil.rmtree(look, ignore_errors=True)
    look.mkdir(parents=True)
    for name in ("ledger.db", "ledger.db-journal"):
        if (path.parent / name).exists():
            shutil.copy(path.parent / name, look / name)
    try:
        with sqlite3.connect(look / "ledger.db") as base:
            return Counter(base.execute("SELECT run, step FROM steps WHERE status = 'done'").fetchall())
    except sqlite3.OperationalError as why:
        if "no such table" in str(why):
            return Counter()
        raise
    finally:
        base.close()
        shutil.rmtree(look)


def ran(root: Path) -> Counter:
    """How often each step of each run was executed by a kernel."""
    return Counter(tuple(line.split()[:2]) for line in (root / "ran.log").read_text().splitlines())


def result(root: Path) -> dict:
    """The result that must be the same however often a run was interrupted: no times and no ids in it."""
    ledger = ledger_of(root)
    runs = ledger.rows(RUNS, order="started")
    newest = runs[-1]["run"] if runs else ""
    steps = ledger.rows(STEPS, order="started", run=newest, status=["done", "cached"])
    outputs = {row["step"]: {name: one.get("value", one.get("digest")) for name, one in row["outputs"].items()} for row in steps}
    tables = sorted({(row["name"], row["partition"], row["rows"], row["digest"]) for row in ledger.rows(DATASETS)})
    return {"run": runs[-1]["status"] if runs else "", "outputs": outputs, "tables": [list(table) for table in tables]}


def unsound(root: Path, expected: dict | None = None) -> list[str]:
    """Everything that is wrong with a project after a fault and its mending; [] when all is well."""
    ledger, found = ledger_of(root), []
    if expected is not None and (got := result(root)) != expected:
        found.append(f"another result: {json.dumps(got)[:600]}")
    found += [f"chain: {finding}" for finding in verify_chain(ledger).findings]
    for row in ledger.rows(RUNS):
        found += [f"verify {row['run']}: {finding}" for finding in verify_run(ledger, row["run"])]
        if row["status"] == "running":
            found.append(f"{row['run']} is still called running")
    found += [f"{step} of {run} is done {times} times" for (run, step), times in known(root).items() if times > 1]
    return found + left_files(root) + left_processes(root)


def left_files(root: Path) -> list[str]:
    """Files that a killed command left and no later one removed: in the project, and in the folder for temporary files."""
    found = []
    for path in filter(Path.is_file, root.rglob("*")):
        inside = path.relative_to(root)
        if inside.parts[0] == "tmp":
            # what Jupyter and Matplotlib keep at home; and Python's own trial of a folder for temporary files
            known = len(inside.parts) > 2 and inside.parts[1].startswith(".")
            trial = len(inside.parts) == 2 and len(path.name) == 8 and path.stat().st_size <= 4
            found += [] if known or trial else [f"left: {inside}"]
        elif path.name.startswith(".") and not (path.name.startswith(".aiexec-") and path.suffix in (".lock", ".holder")):
            found.append(f"left: {inside}")  # the lock of a notebook whose execution was killed stays beside it
    return sorted(found)


def processes(root: Path) -> list[tuple[int, str]]:
    """The living processes that belong to a project: by their environment, or, being forks of a warm server, by their folder.

    The server itself and its idle forks have the environment of whoever was first to need one, and belong to nobody."""
    mark, found = f"AIEXEC_ROOT={root}\0".encode(), []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = place.joinpath("cmdline").read_text().replace("\0", " ").strip()
            ours = "become_server(" not in words and mark in place.joinpath("environ").read_bytes()
            ours = ours or Path(os.readlink(place / "cwd")).is_relative_to(root)
            if ours and ") Z " not in place.joinpath("stat").read_text():
                found.append((int(place.name), words[:120]))
        except (OSError, ValueError):
            continue
    return found


def left_processes(root: Path, wait: float = 5.0) -> list[str]:
    """Processes of a project that outlive its commands for longer than a moment."""
    until = time.monotonic() + wait
    while (found := processes(root)) and time.monotonic() < until:
        time.sleep(0.05)
    return [f"process {number} lives: {words}" for number, words in found]
