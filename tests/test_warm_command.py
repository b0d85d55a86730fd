"""A command that reaches a fork of the warm server is, to whoever typed it, the command: same words, same files, same end."""

import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from configparser import ConfigParser
from fcntl import ioctl
from pathlib import Path

import nbformat
import pytest

from aiexec.run import warm

from .conftest import ROOT, aiexec, environment

SCRIPT = f"""#!{sys.executable}
import sys
from aiexec.cli.entry import main
if __name__ == '__main__':
    sys.exit(main())
"""
GOOD = ["depth: int = 2", "twice = 2 * depth\nprint(twice)"]
BAD = ["depth: int = 2", "1 / 0", "print('never')"]
SLOW = ["import os, time\nwith open('began', 'a') as file:\n    file.write(f'{os.getpid()}\\n')", "time.sleep(60)"]


def write(path: Path, sources: list[str]) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    if "depth" in sources[0]:
        cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with notebooks and the command as pip writes it, and a warm server that is there."""
    place = tmp_path_factory.mktemp("typed")
    (place / "bin").mkdir()
    (place / "bin" / "aiexec").write_text(SCRIPT)
    (place / "bin" / "aiexec").chmod(0o755)
    for name, sources in (("good", GOOD), ("bad", BAD), ("slow", SLOW)):
        write(place / f"{name}.ipynb", sources)
    assert aiexec("new", "wine", cwd=place).returncode == 0
    warm.start()
    return place


def surroundings(warmth: str, **more: str) -> dict[str, str]:
    return environment(**({"AIEXEC_KERNELS": "cold"} if warmth == "cold" else {}), **more)


def typed(world: Path, *words: str, warmth: str = "warm", cwd: str = ".", more: dict | None = None, **how):
    how = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | how
    variables = surroundings(warmth, **(more or {}))
    return subprocess.run([world / "bin" / "aiexec", *words], cwd=world / cwd, env=variables, timeout=60, **how)


def begin(world: Path, *words: str, warmth: str = "warm", **how) -> subprocess.Popen:
    return subprocess.Popen([world / "bin" / "aiexec", *words], cwd=world, env=surroundings(warmth), stdin=subprocess.DEVNULL, process_group=0,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)


def told(done: subprocess.CompletedProcess) -> tuple:
    """What can be seen of an end, without the times it took."""
    steady = [re.sub(rb"\d+\.\d+ s|\d\d:\d\d|\"seconds\": [\d.]+", b"TIME", text or b"") for text in (done.stdout, done.stderr)]
    return done.returncode, *steady


def printed(path: Path) -> list[str]:
    """What the cells of an executed notebook printed."""
    outputs = [out for cell in nbformat.read(path, 4).cells for out in cell.get("outputs", [])]
    return [out.get("text") or out.get("evalue", "") for out in outputs]


def is_command(pid: int) -> bool:
    """Whether the server has leased a fork to this process."""
    return any(lease["who"] == pid and lease["kind"] == "command" for lease in warm.status()["leases"])


def eventually(condition, seconds: float = 30.0):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.02)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kernel_of(world: Path, earlier: int = 0) -> int:
    """The process of the kernel that runs the slow notebook, once it does."""
    def began():
        lines = (world / "began").read_text().split() if (world / "began").exists() else []
        return int(lines[-1]) if len(lines) > earlier else 0

    return eventually(began)


@pytest.mark.parametrize("line", [
    "run --help", "frob", "runs", "runs --json", "run missing.ipynb", "run good.ipynb -p dept x", "models --project wine",
    "portfolio --json --project wine",
])
def test_a_verb_says_the_same(world, line):
    words = line.split()
    assert told(typed(world, *words)) == told(typed(world, *words, warmth="cold"))


@pytest.mark.parametrize("line", ["run good.ipynb -p depth 4 -o out.ipynb", "run bad.ipynb -o out.ipynb --json"])
def test_a_run_says_and_writes_the_same(world, line):
    seen = []
    for warmth in ("warm", "cold"):
        ending = told(typed(world, *line.split(), warmth=warmth, umask=0o027))
        seen.append((ending, printed(world / "out.ipynb"), (world / "out.ipynb").stat().st_mode))
        (world / "out.ipynb").unlink()
    assert seen[0] == seen[1]


def test_the_fork_is_where_the_command_was_typed(world):
    (world / "in").mkdir(exist_ok=True)
    done = typed(world, "run", "../good.ipynb", "-o", "out.ipynb", cwd="in")
    assert done.returncode == 0 and (world / "in" / "out.ipynb").exists()


def test_what_reads_the_output_may_leave(world):
    codes = []
    for warmth in ("warm", "cold"):
        reading, writing = os.pipe()
        os.close(reading)
        codes.append(told(typed(world, "portfolio", "--json", "--project", "wine", warmth=warmth, stdout=writing)))
        os.close(writing)
    assert codes[0] == codes[1]


@pytest.mark.parametrize("number", [0, 1])
def test_a_closed_stream_is_closed(world, number):
    ends = [told(typed(world, "runs", "--project", "wine", warmth=warmth, **{("stdin", "stdout", "stderr")[number]: None},
                       preexec_fn=lambda: os.close(number))) for warmth in ("warm", "cold")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize("more", [{"LC_ALL": "C", "PYTHONIOENCODING": "latin-1:replace"}, {"COLUMNS": "40"}])
def test_variables_count(world, more):
    ends = [told(typed(world, "portfolio", "--project", "wine", warmth=warmth, more=more)) for warmth in ("warm", "cold")]
    assert ends[0] == ends[1] and ends[0][0] == 0


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_is_a_terminal(world, columns):
    seen = []
    for warmth in ("warm", "cold"):
        ours, theirs = pty.openpty()
        ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        done = typed(world, "portfolio", "--project", "wine", warmth=warmth, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        seen.append((done.returncode, os.read(ours, 65536)))
        os.close(ours)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("warmth", ["warm", "cold"])
def test_ctrl_c_keeps_the_notebook(world, warmth):
    (world / "began").unlink(missing_ok=True)
    command = begin(world, "run", "slow.ipynb", "-o", "stopped.ipynb", warmth=warmth)
    kernel = kernel_of(world)
    assert is_command(command.pid) == (warmth == "warm")
    command.send_signal(signal.SIGINT)
    _, said = command.communicate(timeout=30)
    assert command.returncode == 130
    assert said.decode().splitlines()[-1] == "Interrupted. What was done is kept; go on with: aiexec resume"
    assert nbformat.read(world / "stopped.ipynb", 4).metadata.aiexec["failure"] == "cancelled"
    eventually(lambda: not is_alive(kernel))


@pytest.mark.parametrize("number, warmth", [(signal.SIGTERM, "warm"), (signal.SIGHUP, "warm"), (signal.SIGKILL, "warm"),
                                            (signal.SIGTERM, "cold")])
def test_a_signal_ends_all_of_it(world, warmth, number):
    (world / "began").unlink(missing_ok=True)
    command = begin(world, "run", "slow.ipynb", "-o", "stopped.ipynb", warmth=warmth)
    kernel = kernel_of(world)
    command.send_signal(number)
    command.communicate(timeout=30)
    assert command.returncode in (-number, 128 + number)  # a notebook that is under way is written first
    eventually(lambda: not is_alive(kernel) and not is_command(command.pid))


def test_nohup_holds_in_the_fork(world):
    (world / "began").unlink(missing_ok=True)
    command = begin(world, "run", "slow.ipynb", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    kernel_of(world)
    fork = next(lease["pid"] for lease in warm.status()["leases"] if lease["who"] == command.pid)
    os.kill(fork, signal.SIGHUP)
    command.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert command.poll() is None and is_command(command.pid)
    command.kill()
    command.communicate()


def test_to_suspend_the_command_is_to_suspend_the_fork(world):
    (world / "began").unlink(missing_ok=True)
    command = begin(world, "run", "slow.ipynb")
    kernel_of(world)
    fork = next(lease["pid"] for lease in warm.status()["leases"] if lease["who"] == command.pid)
    states = [lambda pid=pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] for pid in (fork, command.pid)]
    command.send_signal(signal.SIGTSTP)
    eventually(lambda: [state() for state in states] == ["T", "T"])
    command.send_signal(signal.SIGCONT)
    eventually(lambda: "T" not in [state() for state in states])
    command.send_signal(signal.SIGINT)
    command.communicate(timeout=30)
    assert command.returncode == 130


def test_the_end_of_the_server_is_told_and_nothing_runs_twice(world):
    (world / "began").unlink(missing_ok=True)
    command = begin(world, "run", "slow.ipynb")
    kernel = kernel_of(world)
    os.kill(warm.status()["pid"], signal.SIGKILL)
    _, said = command.communicate(timeout=30)
    assert command.returncode == 1
    assert said.decode().splitlines()[-1].startswith("Error: The warm server ended while the command ran.")
    eventually(lambda: not is_alive(kernel))
    assert len((world / "began").read_text().split()) == 1
    done = typed(world, "runs", "--project", "wine")
    assert done.returncode == 0, "without a server the command is run where it is typed"
    warm.start()


def test_two_at_once_do_not_meet(world):
    commands = [begin(world, "run", "good.ipynb", "-p", "depth", str(depth), "-o", f"out{depth}.ipynb") for depth in range(3)]
    for depth, command in enumerate(commands):
        _, said = command.communicate(timeout=60)
        assert command.returncode == 0, said
        assert printed(world / f"out{depth}.ipynb") == [f"{2 * depth}\n"]


def test_what_is_installed_is_this_entry():
    facts = ConfigParser(interpolation=None)
    facts.read(ROOT / "settings.ini", encoding="utf-8")
    assert facts["DEFAULT"]["console_scripts"] == "aiexec=aiexec.cli.entry:main"
