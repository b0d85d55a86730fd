"""Crashes: the runner killed at each write, at random times and again while it resumes; kernels killed, stopped and deaf."""

import os
import random
import re
import signal
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path

from tests.faults.project import RUN, Outcome, command, known, lay_out, processes, ran, started, unsound
from tests.faults.trial import Family, pace, unhurt, warmed

WRITES = ("write", "pwrite64", "rename", "fsync", "fdatasync", "unlink", "mkdir", "ftruncate", "link", "writev",
          "pwritev", "pwritev2", "renameat", "renameat2", "unlinkat", "linkat", "symlink", "mkdirat", "rmdir", "copy_file_range",
          "sendfile", "fallocate")


def strace(root: Path, call: str, effect: str = "") -> tuple:
    """Words before a command that put a fault into a kind of its system calls; kernels, programs of their own, go free."""
    (root / "tmp").mkdir(exist_ok=True)
    return ("strace", "-f", "-b", "execve", "-y", "-s", "24", "-o", root / "tmp" / "calls", "-e", "signal=none",
            "-e", f"trace={call}", *(("-e", f"inject={call}:{effect}") if effect else ()))


@cache
def points() -> list[int]:
    """Each write-class system call of a run by number: its kind in thousands, and which of the busiest thread's it is."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        root = lay_out(Path(folder).resolve() / "p")
        done = command(root, *RUN, before=strace(root, ",".join(WRITES)), AIEXEC_KERNELS="cold")
        assert done.returncode == 0, done.stderr
        calls = re.findall(r"^(\d+) +(\w+)\(", (root / "tmp" / "calls").read_text(errors="replace"), re.M)
    counted = Counter(calls)
    most = {kind: max((times for (_, call), times in counted.items() if call == kind), default=0) for kind in WRITES}
    # some more than were seen: threads take turns differently each time
    return [1000 * at + n for at, kind in enumerate(WRITES, 1) for n in range(1, most[kind] + most[kind] // 20 + 2)]


def struck_at(root: Path, sign: str) -> str:
    """The system call that the fault struck, and the file that it was about; a bell between threads, if one was."""
    path = root / "tmp" / "calls"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    hits, begun = [], {}
    for line in lines:  # a call that another thread's interrupted stands in two lines, the file in the first
        thread = line.split(" ")[0]
        begun[thread] = line if "<unfinished" in line else begun.get(thread, "") if "resumed>" in line else ""
        hits += [begun[thread] or line] if sign in line else []
    hit = next((line for line in hits if re.search("<(anon_inode|socket|pipe):", line)), hits[0] if hits else "")
    call = re.sub(r"^\d+\s+", "", hit).split("(")[0]
    about = re.search(re.escape(str(root)) + r"/([^>\"]*)", hit)
    other = re.search(r"<([^>]*)", hit)
    return f"{call} {about[1] if about else other[1] if other else ''}".strip()


def goes_on(root: Path, before: dict | None, **more: str) -> list[str]:  # before: the result it must have; None: any
    """Resume as a person would: what is wrong then."""
    kept, worked = known(root), ran(root)
    done = command(root, "resume", **more)
    if done.returncode == 0 and "Nothing is left unfinished" in done.stdout:  # it was killed before it was recorded, or was done
        done = command(root, *RUN, **more)
    found = [] if done.returncode == 0 else [f"resume ends with {done.returncode}: {done.stdout} {done.stderr}"]
    found += [f"lost: {step}" for step in kept if step not in known(root)]
    found += [f"done again: {step}" for step in kept if ran(root)[step] != worked[step]]
    return found + unsound(root, before)


def killed_at_a_write(number: int, chance: random.Random, place: Path) -> Outcome:
    root, (kind, n) = lay_out(place / "p"), divmod(number, 1000)
    done = command(root, *RUN, before=strace(root, WRITES[kind - 1], f"signal=SIGKILL:when={n}"), AIEXEC_KERNELS="cold")
    struck = struck_at(root, "= ?")
    if done.returncode == 0:
        return Outcome(not (found := unsound(root, unhurt())), "; ".join(found), struck=False)
    if done.returncode not in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return Outcome(False, f"{struck}: it ended with {done.returncode}: {done.stderr}")
    found = goes_on(root, unhurt(), AIEXEC_KERNELS="cold")
    return Outcome(not found, "; ".join([struck, *found]), facts={"call": struck})


def killed_at_random(number: int, chance: random.Random, place: Path, kernels: str = "cold") -> Outcome:
    """Up to five kills in a row: the run, then each attempt to resume it; mostly the runner, at times a kernel or a helper."""
    root, kills, at = lay_out(place / "p", kernels=kernels), 0, []
    words: tuple = RUN
    for _ in range(chance.randint(1, 5)):
        with started(root, *words, AIEXEC_KERNELS=kernels) as process:
            moment, whom = chance.uniform(0.02, 1) * pace() * (1 if kernels == "cold" else 0.4), chance.random()
            time.sleep(moment)
            others = [number for number, _ in processes(root) if number != process.pid]
            victim = chance.choice(others) if others and whom < 0.25 else process.pid
            if process.poll() is None:
                try:
                    os.kill(victim, signal.SIGKILL)
                    kills, at = kills + 1, [*at, f"{'runner' if victim == process.pid else 'child'} at {moment:.2f} s"]
                except ProcessLookupError:
                    pass
            process.communicate(timeout=240)
        words = ("resume",) if known(root) or (root / ".aiexec" / "ledger.head").exists() else RUN
    found = goes_on(root, unhurt(), AIEXEC_KERNELS=kernels)
    return Outcome(not found, "; ".join([*at, *found]), struck=kills > 0, facts={"kills": kills})


def killed_warm(number: int, chance: random.Random, place: Path) -> Outcome:
    warmed()
    return killed_at_random(number, chance, place, "warm")


FAMILIES = [
    Family("syscalls", "the runner is killed (SIGKILL) at each of its write-class system calls, the n-th of a kind in a thread; "
           "then resume: the same result, nothing recorded lost or done again, chain and verify whole, no process or file left",
           killed_at_a_write, points, (2077,)),
    Family("kills", "the runner, or one of its processes, is killed at a random time, then the resume, up to five times in a "
           "row; cold kernels", killed_at_random, lambda: range(1, 201)),
    Family("kills-warm", "the same with warm kernels", killed_warm, lambda: range(1, 201), (1,)),
]
