"""Many at once: first starts of a fresh project, the same pipeline twice, and what the dead have left."""

import json
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from aiexec.govern.audit import verify_chain
from aiexec.run.proof import verify_run
from aiexec.run.records import RUNS
from tests.faults.crash import goes_on
from tests.faults.project import (FACTS, RUN, Outcome, command, lay_out, ledger_of, left_files, left_processes, rough, started,
                                  unsound)
from tests.faults.trial import Family, unhurt, warmed

AT_ONCE = 50


def first_starts(number: int, chance: random.Random, place: Path) -> Outcome:
    """Fifty use cases of one fresh project, each run for the first time by a command of its own, with MLflow recording."""
    warmed()
    root = lay_out(place / "p", recorder="mlflow", kernels="warm")
    for at in range(AT_ONCE):
        folder = root / "usecases" / f"late{at}"
        folder.mkdir()
        facts = {**FACTS, "name": folder.name, "pipeline": {"report": {"notebook": "report.ipynb"}}}
        (folder / "usecase.yaml").write_text(yaml.safe_dump(facts))
        shutil.copy(root / "usecases" / "late" / "report.ipynb", folder)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        words = [("run", f"late{at}", "-p", "month", "2013-05", "-p", "late", str(at)) for at in range(AT_ONCE)]
        done = list(pool.map(lambda one: command(root, *one, timeout=900), words))
    found = [one.stderr[-300:] for one in done if one.returncode]
    found += [f"not recorded in MLflow: {one.stderr[-300:]}" for one in done if "recorder" in one.stderr]
    ledger = ledger_of(root)
    found += [f"chain: {one}" for one in verify_chain(ledger).findings]
    rows = ledger.rows(RUNS, status="done")
    found += [f"{len(rows)} runs are done"] if len(rows) != AT_ONCE else []
    found += [f"verify: {one}" for row in rows for one in verify_run(ledger, row["run"])]
    found += left_files(root) + left_processes(root)
    return Outcome(not found, "; ".join(found[:5]), facts={"starts": AT_ONCE})


def twice(number: int, chance: random.Random, place: Path) -> Outcome:
    """The same pipeline started two to four times at once: those that do the work end well, the others name the holder."""
    kernels = ("cold", "warm")[number % 2]
    if kernels == "warm":
        warmed()
    root, found, many = lay_out(place / "p", kernels=kernels), [], chance.randint(2, 4)
    runners = []
    for _ in range(many):
        runners.append(started(root, *RUN))
        time.sleep(chance.choice([0, 0, 0.05, 0.5]))
    for one in runners:
        out, err = one.communicate(timeout=240)
        refused = "is at work on this" in err
        if one.returncode and not refused:
            found.append(f"it ended with {one.returncode}: {err[-400:]}")
    ends = [one.returncode for one in runners]
    found += [] if 0 in ends else ["nobody did the work"]
    found += unsound(root, unhurt())
    return Outcome(not found, "; ".join([f"{kernels}: {ends.count(0)} of {many} did it", *found]), facts={"starts": many})


def stale(number: int, chance: random.Random, place: Path) -> Outcome:
    """What the dead leave: a lock file with a holder that is no more, half-written files, a run called running."""
    root = lay_out(place / "p")
    locks = root / ".aiexec" / "locks"
    locks.mkdir(parents=True)
    (locks / "late.lock").touch()
    dead = '{"doing": "The run r1 of late", "pid": 99999999, "host": "gone", "since": "2013-05-01"}'
    holder = (dead, "", "{", "\0" * 40)[number % 4]
    (locks / "late.lock.holder").write_text(holder)
    with started(root, *RUN, SLOW="60") as process:
        until = time.monotonic() + 60
        while "count" not in (root / "ran.log").read_text() and time.monotonic() < until:
            time.sleep(0.05)
        refused = command(root, *RUN)
        os.kill(process.pid, (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)[number // 4 % 4])
        process.communicate(timeout=60)
    found = rough(refused) + ([] if "is at work on this" in refused.stderr else [f"the second said {refused.stderr}"])
    found += goes_on(root, unhurt())
    return Outcome(not found, "; ".join([f"holder {holder[:12]!r}", *found]))


def moved_on(number: int, chance: random.Random, place: Path) -> Outcome:
    """A runner is stopped (SIGSTOP), its lock taken away as another host would, the run resumed, and the first woken again."""
    root = lay_out(place / "p")
    with started(root, *RUN, SLOW="2") as process:
        until = time.monotonic() + 60
        while "count" not in (root / "ran.log").read_text() and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGSTOP)
        for left in (root / ".aiexec" / "locks").iterdir():  # as when two hosts share a folder without common locks
            left.unlink()
        resumed = command(root, "resume")
        os.kill(process.pid, signal.SIGCONT)
        _, err = process.communicate(timeout=120)
    found = [] if resumed.returncode == 0 else [f"resume: {resumed.stderr}"]
    gently = process.returncode == 1 and "Traceback" not in err
    found += [] if gently else [f"the first ended with {process.returncode}: {err[-400:]}"]
    runs = [json.dumps(row["status"]) for row in ledger_of(root).rows(RUNS)]
    found += unsound(root, unhurt())
    return Outcome(not found, "; ".join([f"runs {runs}", *found]))


FAMILIES = [
    Family("starts", f"{AT_ONCE} commands at once are the first of a fresh project, MLflow's database included: none fails",
           first_starts, lambda: range(1, 21), alone=True),
    Family("twice", "the same pipeline is started two to four times at once: the work is done once, the others name the holder",
           twice, lambda: range(1, 41), (1,)),
    Family("stale", "locks and holders of the dead, whole and torn; the living are named; killed by KILL, TERM, HUP or INT, then "
           "resumed", stale, lambda: range(1, 17)),
    Family("fence", "a runner sleeps (SIGSTOP), another takes its run over, the first wakes: it stops, and overwrites nothing",
           moved_on, lambda: range(1, 11), (1,)),
]
