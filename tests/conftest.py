"""What the tests share: the command line, and one year of real flights. With AIEXEC_NO_SKIP=1 (as in CI) a skip is a failure."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AIEXEC = Path(sys.executable).with_name("aiexec")


def environment(**more: str) -> dict[str, str]:
    """This environment without the choices of a surrounding project."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AIEXEC_")} | more


def aiexec(*words: object, cwd: Path, timeout: float = 900, **more: str) -> subprocess.CompletedProcess:
    """Run one command as a person would, in a folder."""
    return subprocess.run([AIEXEC, *map(str, words)], cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=timeout)


def plain_user() -> None:
    """Before a child starts: let permissions hold for it even where the tests run as root."""
    if os.geteuid() == 0:
        for power in (1, 2):  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH leave the bounding set (PR_CAPBSET_DROP is 24)
            if ctypes.CDLL(None, use_errno=True).prctl(24, power, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "permissions cannot be made to hold for root")


def answer(*words: object, cwd: Path, code: int = 0):
    """The plain data that a command prints."""
    done = aiexec(*words, "--json", cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="session")
def year(tmp_path_factory) -> Path:
    """The whole demo, lived through once: a project folder with a year behind it."""
    place = tmp_path_factory.mktemp("year")
    done = aiexec("demo", "flights", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    (place / "printed.txt").write_text(done.stdout, encoding="utf-8")
    return place / "flights"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("AIEXEC_NO_SKIP") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be skipped: {report.longrepr}"
