"""What the tests share: the command line, and one year of real flights. With AIEXEC_NO_SKIP=1 (as in CI) a skip is a failure."""

import ctypes
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from aiexec.run import warm
from aiexec.store import sa

ROOT = Path(__file__).parents[1]
AIEXEC = Path(sys.executable).with_name("aiexec")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a job in the background has it; children of the tests must not
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["AIEXEC_RUNTIME"] = tempfile.mkdtemp(prefix="aiexec-tests-")  # a warm server for these tests only


@pytest.fixture(scope="session", autouse=True)
def no_server_is_left():
    """The warm server of the tests ends with them."""
    yield
    warm.stop(force=True)
    shutil.rmtree(os.environ["AIEXEC_RUNTIME"], ignore_errors=True)


def environment(**more: str) -> dict[str, str]:
    """This environment without the choices of a surrounding project."""
    kept = {name: value for name, value in os.environ.items() if name == "AIEXEC_RUNTIME" or not name.startswith("AIEXEC_")}
    return kept | more


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


@pytest.fixture(scope="session")
def month(tmp_path_factory) -> Path:
    """A small project: one month in production, on a sample of the flights. Copy it before changing it."""
    place = tmp_path_factory.mktemp("month")
    done = aiexec("demo", "flights", "--fast", "--until", "2013-04", "--json", cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    (place / "printed.json").write_text(done.stdout, encoding="utf-8")
    return place / "flights"


@pytest.fixture(scope="session")
def server():
    """A PostgreSQL server of our own on a free port of 127.0.0.1; its URL without a database."""
    places = [Path(found).parent] if (found := shutil.which("initdb")) else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    places = [place for place in places if (place / "postgres").exists()]
    if not places:
        missing = "PostgreSQL is not installed (Debian: apt-get install postgresql)"
        pytest.fail(missing) if os.environ.get("AIEXEC_REQUIRE_POSTGRES") == "1" else pytest.skip(missing)
    folder = Path(tempfile.mkdtemp(prefix="aiexec-postgres-"))
    # PostgreSQL refuses to run as root
    user = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    data, log = folder / "data", (folder / "log").open("wb")
    try:
        subprocess.run([places[0] / "initdb", "-D", data, "-U", "aiexec", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"],
                       check=True, stdout=log, stderr=log, cwd=folder, **user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = {"port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_connections": 60}
        process = subprocess.Popen([places[0] / "postgres", "-D", data, *[f"--{key}={value}" for key, value in options.items()]],
                                   stdout=log, stderr=log, cwd=folder, **user)
    except BaseException:
        print((folder / "log").read_text())
        shutil.rmtree(folder)
        raise
    try:
        url = f"postgresql+psycopg://aiexec@127.0.0.1:{port}"
        until = time.monotonic() + 30
        while True:
            try:
                sa.create_engine(f"{url}/postgres").connect().close()
                break
            except sa.exc.OperationalError:
                assert process.poll() is None and time.monotonic() < until, (folder / "log").read_text()
                time.sleep(0.05)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # ends the sessions that are open
        process.wait(30)
        log.close()
        shutil.rmtree(folder)


def new_database(server: str, name: str) -> str:
    engine = sa.create_engine(f"{server}/postgres", isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    return f"{server}/{name}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("AIEXEC_NO_SKIP") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped where nothing may be skipped: {report.longrepr}"
