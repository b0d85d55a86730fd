"""Disk, clock and limits: no room, failing writes, read-only, few descriptors, another time, much output, many runs."""

import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat

from aiexec.run.records import RUNS
from aiexec.store import now
from tests.faults.crash import WRITES, goes_on, points, strace, struck_at
from tests.faults.project import AIEXEC, CELLS, RUN, Outcome, command, environment, lay_out, ledger_of, rough, started, unsound
from tests.faults.trial import Family, unhurt


def ended_well_or_gently(done: subprocess.CompletedProcess) -> list[str]:
    """A command under a fault may come through; otherwise it says one sentence."""
    return [] if done.returncode == 0 else rough(done)


def failing_write(number: int, chance: random.Random, place: Path) -> Outcome:
    """One write fails: by turns the disk is full or broken at the n-th call of a kind."""
    root, (kind, n) = lay_out(place / "p"), divmod(number, 1000)
    error = ("ENOSPC", "EIO")[(kind + n) % 2]
    done = command(root, *RUN, before=strace(root, WRITES[kind - 1], f"error={error}:when={n}"), AIEXEC_KERNELS="cold")
    struck = struck_at(root, "(INJECTED)")
    pipe = "anon_inode" in struck or "socket" in struck or "pipe" in struck  # a thread's bell, which cannot fail so in earnest
    found = [] if pipe or not struck or done.returncode == 0 else rough(done)
    found += goes_on(root, unhurt(), AIEXEC_KERNELS="cold") if done.returncode else unsound(root, unhurt())
    hit = bool(struck) and not pipe
    return Outcome(not found, "; ".join([f"{error} at {struck}", *found]), struck=hit, facts={"call": struck})


def full(number: int, chance: random.Random, place: Path) -> Outcome:
    """A small file system of its own with some room left fills up in the middle of a run; then there is room again."""
    (place / "small").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "aiexec-faults", place / "small"], check=True)
    try:
        root = lay_out(place / "small" / "p")
        tmp = {"TMPDIR": str(place), "HOME": str(place)}
        free = number * 4096
        with (place / "small" / "ballast").open("wb") as ballast:
            room = os.statvfs(place / "small")
            ballast.write(b"\0" * max(0, room.f_bavail * room.f_bsize - free))
        done = command(root, *RUN, AIEXEC_KERNELS="cold", **tmp)
        found = ended_well_or_gently(done)
        (place / "small" / "ballast").unlink()
        found += goes_on(root, unhurt(), AIEXEC_KERNELS="cold", **tmp) if done.returncode else unsound(root, unhurt())
    finally:
        subprocess.run(["umount", place / "small"], check=True)
    return Outcome(not found, "; ".join([f"{free // 1024} KiB free", *found]), struck=done.returncode != 0)


# permissions hold for root, too, without these powers
PLAIN = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()


def read_only(number: int, chance: random.Random, place: Path) -> Outcome:
    """A folder or file of a used project cannot be written: the project's own, the ledger, its head, runs, locks."""
    root = lay_out(place / "p")
    first = command(root, *RUN, AIEXEC_KERNELS="cold")
    what = [".aiexec", ".aiexec/ledger.db", ".aiexec/ledger.head", ".aiexec/runs", ".aiexec/locks", "."][number % 6]
    path, mode = root / what, (root / what).stat().st_mode
    path.chmod(0o444 if path.is_file() else 0o555)
    done = command(root, "run", "late", "-p", "month", "2013-06", before=PLAIN, AIEXEC_KERNELS="cold")
    path.chmod(mode)
    found = ([] if first.returncode == 0 else [first.stderr]) + ended_well_or_gently(done)
    found += goes_on(root, None, AIEXEC_KERNELS="cold") if done.returncode and "2013-06" not in done.stdout else []
    again = command(root, "run", "late", "-p", "month", "2013-06", AIEXEC_KERNELS="cold")
    found += [] if again.returncode == 0 else [again.stderr]
    found += unsound(root)
    return Outcome(not found, "; ".join([f"{what} read-only: {done.returncode}", *found]), struck=done.returncode != 0)


def few_descriptors(number: int, chance: random.Random, place: Path) -> Outcome:
    """A process may open few files."""
    root, many = lay_out(place / "p"), 6 + 2 * number
    done = subprocess.run([AIEXEC, *RUN], cwd=root, env=environment(root, AIEXEC_KERNELS="cold"), capture_output=True, text=True,
                          timeout=240, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (many, many)))
    python = "Fatal Python error" in done.stderr or "Too many open files" in done.stderr and "Error:" not in done.stderr
    found = [] if done.returncode == 0 or python and many < 20 else rough(done)
    found += goes_on(root, unhurt(), AIEXEC_KERNELS="cold") if done.returncode else unsound(root, unhurt())
    return Outcome(not found, "; ".join([f"{many} descriptors: {done.returncode}", *found]), struck=done.returncode != 0)


JUMPS = {"a day back": -86_400, "400 days back": -400 * 86_400, "400 days on": 400 * 86_400, "12 years on": 12 * 31_557_600,
         "an hour back": -3600, "an hour on": 3600, "a second back": -1}
# the clock that Python reads is set before anything else is imported; the system's own cannot be, on a machine that others use
JUMPED = """
import datetime, sys, time
by, now = float(sys.argv[1]), time.time
class Jumped(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(seconds=by)
datetime.datetime, time.time, sys.argv = Jumped, lambda: now() + by, sys.argv[2:]
from aiexec.cli.commands import main
main()
"""


def another_time(number: int, chance: random.Random, place: Path) -> Outcome:
    """The clock jumps between a run, its crash and its resume, across years, daylight saving and back."""
    root, jump = lay_out(place / "p"), [*JUMPS][number % len(JUMPS)]
    zone = ("America/New_York", "Australia/Lord_Howe", "UTC", "Asia/Kathmandu")[number % 4]
    with started(root, *RUN, SLOW="60", AIEXEC_KERNELS="cold", TZ=zone) as process:
        until = time.monotonic() + 60
        while "count" not in (root / "ran.log").read_text() and time.monotonic() < until:
            time.sleep(0.05)
        process.kill()
        process.communicate()
    resumed = command(root, "resume", before=(sys.executable, "-c", JUMPED, JUMPS[jump]), AIEXEC_KERNELS="cold", TZ=zone)
    found = [] if resumed.returncode == 0 else [f"resume: {resumed.stderr[-400:]}"]
    found += unsound(root, unhurt())
    again = command(root, "run", "late", "-p", "month", "2013-06", AIEXEC_KERNELS="cold")
    found += [] if again.returncode == 0 else [again.stderr]
    return Outcome(not found, "; ".join([f"{jump} in {zone}", *found, *unsound(root)]))


def much_output(number: int, chance: random.Random, place: Path) -> Outcome:
    """A cell prints 100 MB, in one line, in many, in many small pieces, or shows it as a result."""
    code = ("print('x' * 100_000_000)", "for _ in range(1_000_000):\n    print('x' * 99)", "'x' * 100_000_000",
            "import sys\nfor _ in range(100):\n    sys.stderr.write('x' * 1_000_000)")[number % 4]
    root = lay_out(place / "p", cells={**CELLS, "count": [*CELLS["count"][:2], ("", code), *CELLS["count"][2:]]})
    begun = time.monotonic()
    done = command(root, *RUN, timeout=600)
    took, most = time.monotonic() - begun, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    found = ended_well_or_gently(done) + unsound(root, unhurt() if done.returncode == 0 else None)
    kept = next((root / ".aiexec" / "runs").glob("*/count/*/notebook.ipynb"))
    nbformat.read(kept, 4)
    size = kept.stat().st_size // 10**6
    return Outcome(not found, "; ".join([f"{code[:40]!r}: {took:.0f} s, {most} MB at most, notebook {size} MB", *found]))


def many_runs(number: int, chance: random.Random, place: Path) -> Outcome:
    """10,000 runs are on record: listing and running stay quick."""
    root = lay_out(place / "p")
    ledger = ledger_of(root)
    row = {"usecase": "late", "partition": "2013-01", "status": "done", "started": now(), "ended": now(), "actor": "ada",
           "parameters": {}, "steps": [], "error": "", "fence": 1}
    with ledger.change("runs.imported", "late", tables=(RUNS,)) as change:
        change.insert(RUNS, *({**row, "run": f"r{at:08}-000000-0000"} for at in range(10_000)))
    spent = {}
    for words in (("runs",), ("runs", "--limit", "0"), ("runs", "--json"), RUN, RUN, ("verify",)):
        begun = time.monotonic()
        done = command(root, *words)
        spent[" ".join(words[:3])] = round(time.monotonic() - begun, 1)
        if done.returncode:
            return Outcome(False, f"{words}: {done.stderr}")
    return Outcome(True, f"{spent}", facts=spent)


PATHS = ("with spaces", "späße", "emoji 🛫", "new\nline", "quote'd \"name\"", "$HOME;`id`", "-rf", "x" * 200, "per%20cent",
         "back\\slash", "#%?&=", "link")


def odd_path(number: int, chance: random.Random, place: Path) -> Outcome:
    """The project stands in a folder with an odd name, or is reached by a link."""
    name = PATHS[number % len(PATHS)]
    real = place / (name if name != "link" else "real")
    real.mkdir()
    root = lay_out(real / "p")
    if name == "link":
        (place / "link").symlink_to(real)
        root = place / "link" / "p"
    done = command(root, *RUN, AIEXEC_KERNELS=("warm", "cold")[number // len(PATHS) % 2])
    found = ([] if done.returncode == 0 else [done.stderr[-500:]]) + unsound(real / "p", unhurt())
    output = root / (f"{name}.ipynb" if len(name) < 99 else "output.ipynb")
    alone = command(root, "run", "usecases/late/report.ipynb", "-o", output)
    found += [] if alone.returncode == 0 else [f"alone: {alone.stderr[-500:]}"]
    return Outcome(not found, "; ".join([repr(name[:20]), *found]))


def roots() -> bool:
    return os.geteuid() == 0 and shutil.which("mount") is not None


FAMILIES = [
    Family("errors", "each write-class system call of the runner fails once, by turns with ENOSPC and EIO: it comes through or says "
           "one sentence; then resume: the same result", failing_write, points, (2050,)),
    Family("full", "a file system of 4 MB has n × 4 KiB left; one sentence; with room again, resume: the same result",
           full, lambda: range(1, 121) if roots() else (), (20,) if roots() else ()),
    Family("readonly", "folders and files that may not be written", read_only, lambda: range(1, 7)),
    Family("descriptors", "8 to 126 open files allowed", few_descriptors, lambda: range(1, 61)),
    Family("clock", f"the clock jumps ({', '.join(JUMPS)}) between a crash and its resume, in four time zones",
           another_time, lambda: range(1, 29)),
    Family("output", "a cell puts out 100 MB", much_output, lambda: range(1, 5)),
    Family("many", "10,000 runs are on record", many_runs, lambda: range(1, 2)),
    Family("paths", "the project's folder has an odd name", odd_path, lambda: range(1, 2 * len(PATHS) + 1)),
]
