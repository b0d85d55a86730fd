"""A family of cases, tried one by one or side by side; each result is kept at once, so that a long trial can go on later."""

import json
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from aiexec.files import digest_of
from aiexec.run import warm
from tests.faults.project import RUN, Outcome, command, lay_out, processes, result

ROOT = Path(__file__).parents[2]
SEED = 20131


@dataclass(frozen=True)
class Family:
    """Cases of one kind, each with a number."""

    name: str
    tries: str  # what is done to a run, and what must hold
    case: Callable[[int, random.Random, Path], Outcome]
    full: Callable[[], Iterable[int]]  # the numbers of the full set
    small: tuple[int, ...] = ()  # the cases of `make test`
    alone: bool = False  # not side by side with others: it fills the machine by itself
    of: str = "run"  # the folder of the library that it tries


@cache
def library(folder: str) -> str:
    """The digest of what was tried: the modules of a folder of the library, and those at its top which all stand on."""
    modules = [*(ROOT / "aiexec").glob("*.py"), *(ROOT / "aiexec" / folder).glob("*.py")]
    modules = [path for path in modules if path.name not in ("_modidx.py", "projects.py")]
    return digest_of([[path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")] for path in sorted(modules)])[:12]


@cache
def _unhurt(recorder: str) -> tuple[str, float]:
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-", ignore_cleanup_errors=True) as folder:
        root = lay_out(Path(folder).resolve() / "unhurt", recorder)
        done = command(root, *RUN)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.dumps(result(root)), time.monotonic() - begun


UNHURT = threading.Lock()


@contextmanager
def own_server() -> Iterator[None]:
    """A warm server for these trials only, which is not of any project; it starts when it is first needed."""
    os.environ["AIEXEC_RUNTIME"] = tempfile.mkdtemp(prefix="aiexec-faults-")
    try:
        yield
    finally:
        warm.stop(force=True)
        shutil.rmtree(os.environ.pop("AIEXEC_RUNTIME"), ignore_errors=True)


def warmed() -> None:
    """Have the warm server up."""
    with UNHURT:
        warm.start()
        until = time.monotonic() + 60
        while not warm.is_up() and time.monotonic() < until:
            time.sleep(0.1)


def unhurt(recorder: str = "none") -> dict:
    """The result of a run that nothing happened to."""
    with UNHURT:
        return json.loads(_unhurt(recorder)[0])


def pace() -> float:
    """The seconds that an unhurt run takes on this machine, with cold kernels."""
    with UNHURT:
        return _unhurt("none")[1]


def try_case(family: Family, number: int, seed: int = SEED) -> Outcome:
    """Try one case in a folder of its own, which is kept when it ends badly."""
    place = Path(tempfile.mkdtemp(prefix=f"faults-{family.name}-{number}-")).resolve()
    begun = time.monotonic()
    try:
        outcome = family.case(number, random.Random(f"{family.name} {number} {seed}"), place)
    except Exception:
        outcome = Outcome(False, traceback.format_exc())
    for process, _ in processes(place) + processes(place / "p"):
        subprocess.run(["kill", "-9", str(process)], stderr=subprocess.DEVNULL)
    if outcome.ok:
        shutil.rmtree(place, ignore_errors=True)
    kept = {} if outcome.ok else {"place": str(place)}
    facts = {**outcome.facts, **kept, "seconds": round(time.monotonic() - begun, 2)}
    return Outcome(outcome.ok, outcome.says, outcome.struck, facts)


class Record:
    """What was found so far, one line a case."""

    def __init__(self, folder: Path):
        self.folder, self.lock = folder, threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def rows(self, family: str) -> list[dict]:
        """The last result of each case, by number."""
        path = self.folder / f"{family}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return sorted({row["number"]: row for row in map(json.loads, lines)}.values(), key=lambda row: row["number"])

    def add(self, family: Family, number: int, seed: int, outcome: Outcome) -> None:
        row = {"number": number, "seed": seed, "library": library(family.of), **asdict(outcome)}
        with self.lock, (self.folder / f"{family.name}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def forget(self, family: str) -> None:
        (self.folder / f"{family}.jsonl").unlink(missing_ok=True)


def try_family(family: Family, record: Record, *, seed: int = SEED, first: int = 1, last: float = float("inf"),
               until: float = float("inf"), jobs: int = 1, tell: Callable[[str], None] = print) -> None:
    """Try what is left of a family, some cases at a time, until it is through or the time is up."""
    done = {row["number"] for row in record.rows(family.name) if row["seed"] == seed}
    waiting = (number for number in family.full() if first <= number <= last and number not in done)
    jobs = 1 if family.alone else jobs
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(try_case, family, number, seed): number for number in islice(waiting, jobs)}
        while running:
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                number, outcome = running.pop(ended), ended.result()
                record.add(family, number, seed, outcome)
                word = "well" if outcome.ok else "BAD"
                tell(f"{family.name} {number}: {word} {outcome.facts['seconds']:.1f} s  {outcome.says[:400]}")
                if time.monotonic() < until and (another := next(waiting, None)) is not None:
                    running[pool.submit(try_case, family, another, seed)] = another
