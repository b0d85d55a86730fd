"""Warm kernels: like cold ones in what a notebook can notice, safe to compute in, and never left behind."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import nbformat
import pytest
from jupyter_client import AsyncKernelManager, BlockingKernelClient, KernelManager
from nbclient import NotebookClient

from aiexec.run import warm
from aiexec.run.kernels import WarmKernels, running_kernel
from aiexec.run.provisioner import SPEC, install

ROOT = Path(__file__).parents[1]
PROBE = (Path(__file__).parent / "probe.py").read_text(encoding="utf-8")
LITTLE = {"AIEXEC_PRELOAD": "ipykernel.kernelapp,ipykernel.debugger", "AIEXEC_SPARES": "1"}


@pytest.fixture(autouse=True)
def server():
    """The server of these tests, with everything imported."""
    warm.start()


@contextmanager
def little_server(**more: str):
    """Another server of this user, in a runtime folder of its own, that has little to import."""
    folder = tempfile.mkdtemp(prefix="aiexec-little-")
    try:
        with patch.dict(os.environ, {"AIEXEC_RUNTIME": folder, **LITTLE, **more}):
            yield Path(folder)
            warm.stop(force=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def execute(kernels: WarmKernels, code: str, cwd: Path, **environment: str) -> tuple[str, str, str]:
    """Kind, notice and what a cell prints; an error in it is printed as well."""
    said = []

    def keep(message: dict) -> None:
        content = message["content"]
        said.append(content.get("text") or "".join(content.get("traceback", [])) or content.get("data", {}).get("text/plain", ""))

    async with running_kernel(kernels, cwd, environment) as kernel:
        await kernel.client.execute_interactive(code, allow_stdin=False, output_hook=keep, timeout=120)
        return kernel.kind, kernel.notice, "".join(said)


def run(code: str, cwd: Path, kernels: WarmKernels | None = None, **environment: str) -> tuple[str, str, str]:
    return asyncio.run(execute(kernels or WarmKernels(), code, cwd, **environment))


def wait_until(condition, seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -- what a notebook can notice


def test_a_notebook_notices_no_difference(tmp_path):
    """All that the probe sees is equal, but for what it names itself."""
    old = os.umask(0o027)
    try:
        given = {"PYTHONPATH": f"{tmp_path}:lib", "TZ": "Asia/Tokyo", "COLOUR": "blue"}
        kinds, seen = [], []
        for kernels in (WarmKernels(warm=False), WarmKernels()):
            kind, notice, text = run(PROBE, tmp_path, kernels, **given)
            kinds.append((kind, notice))
            seen.append(json.loads(text))
    finally:
        os.umask(old)
    assert kinds == [("cold", "warm kernels were not asked for"), ("warm", "")]
    cold, forked = seen
    assert {name: (cold[name], forked[name]) for name in cold if cold[name] != forked[name]} == {}
    assert forked["umask"] == "0027" and forked["cwd"] == str(tmp_path) and forked["zone"][0] == ["JST", "JST"]
    assert forked["path"][:2] == [str(tmp_path), str(tmp_path / "lib")]


def test_two_kernels_draw_different_numbers(tmp_path):
    code = "import random, numpy, uuid; print(random.random(), numpy.random.rand(), numpy.random.default_rng().random(), uuid.uuid4())"
    one, other = (run(code, tmp_path)[2].split() for _ in range(2))
    assert len(one) == 4 and not set(one) & set(other)


@pytest.mark.parametrize("name, value", [("OMP_NUM_THREADS", "3"), ("LC_ALL", "POSIX")])
def test_a_variable_that_is_read_at_the_start_asks_for_a_cold_kernel(tmp_path, name, value):
    kind, notice, text = run("print('ran')", tmp_path, **{name: value})
    assert (kind, text) == ("cold", "ran\n")
    assert "differs from the warm server's, and is read only at the start of a process" in notice


def test_a_server_started_where_scikit_learn_was_imported_serves_everybody(tmp_path):
    set_by_it = {"KMP_DUPLICATE_LIB_OK": "True", "KMP_INIT_AT_FORK": "FALSE"}
    plain = {name: value for name, value in os.environ.items() if name not in set_by_it}
    with little_server(**set_by_it):
        warm.start()
        assert run("print('with')", tmp_path)[::2] == ("warm", "with\n")
        with patch.dict(os.environ, plain | {"AIEXEC_RUNTIME": os.environ["AIEXEC_RUNTIME"]}, clear=True):
            assert run("print('without')", tmp_path)[::2] == ("warm", "without\n")


def test_a_module_that_hides_an_imported_one_asks_for_a_cold_kernel(tmp_path):
    (tmp_path / "sklearn.py").write_text("own = True")
    kind, notice, text = run("import sklearn; print(sklearn.own)", tmp_path)
    assert (kind, text) == ("cold", "True\n") and "has a module sklearn" in notice
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    kind, notice, text = run("import sklearn; print(sklearn.own)", elsewhere, PYTHONPATH=str(tmp_path))
    assert (kind, text) == ("cold", "True\n") and "has a module sklearn" in notice
    # a module of the project that hides nothing is read as it is at that moment
    for late in ("a", "few"):
        (elsewhere / "flights.py").write_text(f"late = {late!r}")
        assert run("import flights; print(flights.late)", elsewhere)[::2] == ("warm", f"{late}\n")


def test_a_matplotlibrc_beside_the_notebook_is_read(tmp_path):
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 7\n")
    kind, notice, text = run("import matplotlib; print(matplotlib.rcParams['lines.linewidth'])", tmp_path)
    assert (kind, text) == ("cold", "7.0\n") and "matplotlibrc" in notice


# -- computing in a fork

COMPUTE = """
import asyncio, multiprocessing, os, threading
import numpy, pandas
from joblib import Parallel, delayed
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_info, threadpool_limits
draws = numpy.random.default_rng(0)
X = draws.normal(size=(4000, 6)); y = X[:, 0] + X[:, 1] ** 2 > 1
with threadpool_limits(2):
    print("boosting", HistGradientBoostingClassifier(max_iter=20).fit(X, y).score(X, y) > 0.9)
print("openmp", any(pool["user_api"] == "openmp" and pool["num_threads"] >= 1 for pool in threadpool_info()))
print("blas", numpy.allclose((X.T @ X)[0, 0], (X[:, 0] ** 2).sum()))
print("threads", Parallel(2, backend="threading")(delayed(pow)(n, 2) for n in range(4)))
print("loky", Parallel(2, backend="loky")(delayed(pow)(n, 2) for n in range(4)))
with multiprocessing.get_context("fork").Pool(2) as pool:
    print("processes", pool.map(abs, [-1, -2]))
pandas.DataFrame(X, columns=list("abcdef")).to_parquet("x.parquet")
print("parquet", pandas.read_parquet("x.parquet").shape)
async def soon():
    await asyncio.sleep(0.01)
    return 7
print("await", await soon())
"""


def test_openmp_blas_processes_and_threads_work_in_a_fork(tmp_path):
    kind, notice, text = run(COMPUTE, tmp_path)
    assert (kind, notice) == ("warm", "")
    assert dict(line.split(" ", 1) for line in text.splitlines()) == {
        "boosting": "True", "openmp": "True", "blas": "True", "threads": "[0, 1, 4, 9]", "loky": "[0, 1, 4, 9]", "processes": "[1, 2]",
        "parquet": "(4000, 6)", "await": "7"}


def notebook(*sources: str, name: str = "aiexec") -> nbformat.NotebookNode:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": name, "display_name": name, "language": "python"}})


@pytest.fixture(scope="module")
def kernelspec(tmp_path_factory):
    """The kernelspec where Jupyter finds it, whatever was installed."""
    folder = tmp_path_factory.mktemp("jupyter")
    install(folder)
    with patch.dict(os.environ, JUPYTER_PATH=str(folder / "share" / "jupyter")):
        yield folder


WHO = "import os; print(os.path.basename(os.readlink('/proc/self/exe')), open(f'/proc/{os.getppid()}/cmdline').read().split(chr(0))[-2])"


def test_nbclient_shows_figures_and_widgets_and_refuses_input(kernelspec, tmp_path):
    nb = notebook("import matplotlib.pyplot as plt\nplt.plot([1, 2]);", "from ipywidgets import IntSlider\nIntSlider(3)", WHO,
                  "input('name? ')")
    NotebookClient(nb, timeout=60, allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}).execute()
    figure, widget, who, refused = (cell.outputs for cell in nb.cells)
    assert [sorted(one.data) for one in figure if one.output_type == "display_data"] == [["image/png", "text/plain"]]
    assert "application/vnd.jupyter.widget-view+json" in widget[0].data and nb.metadata.widgets
    assert "become_server" in who[0].text or ".sock" in who[0].text
    assert refused[0].ename == "StdinNotImplementedError"


def test_a_kernel_restarts_and_is_interrupted_and_ends_with_its_children(kernelspec):
    async def live() -> None:
        manager = AsyncKernelManager(kernel_name="aiexec")
        await manager.start_kernel()
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready(timeout=60)
        first = manager.provisioner.pid
        waiting = client.execute("import time\ntime.sleep(600)")
        await asyncio.sleep(0.2)
        await manager.interrupt_kernel()
        while (reply := await client.get_shell_msg(timeout=60))["parent_header"]["msg_id"] != waiting:
            continue
        assert reply["content"]["ename"] == "KeyboardInterrupt"
        await manager.restart_kernel()
        await client.wait_for_ready(timeout=60)
        assert manager.provisioner.kind == "warm" and manager.provisioner.pid != first and not is_alive(first)
        reply = await client.execute("import subprocess; x = subprocess.Popen(['sleep', '600']).pid", user_expressions={"pid": "x"}, reply=True)
        child = int(reply["content"]["user_expressions"]["pid"]["data"]["text/plain"])
        folder = Path(manager.provisioner.folder)
        client.stop_channels()
        await manager.shutdown_kernel()
        wait_until(lambda: not is_alive(child))
        assert not folder.exists()

    asyncio.run(live())


def test_the_blocking_manager_works_too(kernelspec):
    manager = KernelManager(kernel_name="aiexec")
    manager.start_kernel()
    client: BlockingKernelClient = manager.client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    assert client.execute("1", reply=True)["content"]["status"] == "ok" and manager.provisioner.kind == "warm"
    client.stop_channels()
    manager.shutdown_kernel()
    assert not manager.has_kernel


# -- papermill

PARAMETERS = nbformat.v4.new_code_cell("a = 0", metadata={"tags": ["parameters"]})


def papermill(tmp_path: Path, nb: nbformat.NotebookNode, *words: str) -> tuple[int, str, nbformat.NotebookNode]:
    nbformat.write(nb, tmp_path / "in.ipynb")
    program = "import sys; from papermill.__main__ import papermill; sys.argv[0] = 'papermill'; papermill()"
    with little_server():
        warm.start()
        done = subprocess.run([sys.executable, "-c", program, *words, "in.ipynb", "out.ipynb"], cwd=tmp_path, capture_output=True,
                              text=True, timeout=300)
    return done.returncode, done.stderr, nbformat.read(tmp_path / "out.ipynb", 4)


def test_papermill_runs_with_our_kernelspec_and_with_our_engine(kernelspec, tmp_path):
    nb = notebook("print(a)", name="python3")
    nb.cells.insert(0, PARAMETERS)
    for words in (["-k", "aiexec"], ["--engine", "aiexec"]):
        code, said, out = papermill(tmp_path, nb, *words, "-p", "a", "12")
        assert code == 0, said
        assert [cell.outputs[0].text for cell in out.cells[2:]] == ["12\n"]
        assert out.metadata.papermill.parameters == {"a": 12} and out.metadata.papermill.input_path.endswith("in.ipynb")


@pytest.mark.parametrize("source, words", [("1 / 0", "error in cell"), ("import os; os.kill(os.getpid(), 9)", "kernel died (signal 9)")])
def test_the_engine_tells_how_a_notebook_ended(tmp_path, source, words):
    code, said, out = papermill(tmp_path, notebook("x = 1", source, "x = 2", name="python3"), "--engine", "aiexec")
    assert code == 1
    marks = [cell.source for cell in out.cells if "aiexec-mark" in cell.metadata.get("tags", [])]
    assert marks[0].startswith(f"**FAILED** · {words}") and marks[1].startswith("**NOT RUN**")
    assert [cell.metadata.papermill.status for cell in out.cells if cell.cell_type == "code"] == ["completed", "failed", "pending"]


def test_the_wheel_brings_the_kernelspec():
    assert json.loads((ROOT / "share/jupyter/kernels/aiexec/kernel.json").read_text()) == SPEC
    from importlib.metadata import entry_points

    assert entry_points(group="jupyter_client.kernel_provisioners", name="aiexec")["aiexec"].load().__name__ == "WarmProvisioner"
    assert entry_points(group="papermill.engine", name="aiexec")["aiexec"].load().__name__ == "WarmEngine"


# -- the server's life


def test_of_twenty_started_at_once_one_server_remains():
    with little_server() as folder:
        program = "from aiexec.run import warm; warm.start(); print(warm.status()['pid'])"
        starts = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(20)]
        pids = {start.communicate(timeout=120)[0].strip() for start in starts}
        assert len(pids) == 1 and "" not in pids
        assert len(list(folder.glob("*.sock"))) == 1


def test_a_killed_server_takes_its_kernels_along_and_another_takes_its_place(tmp_path):
    with little_server():
        async def lose() -> tuple[int, int]:
            async with running_kernel(WarmKernels(), tmp_path) as kernel:
                pid = kernel.manager.provisioner.pid
                kernel.client.execute("import subprocess, time; subprocess.Popen(['sleep', '600']); time.sleep(600)")
                os.kill(warm.status()["pid"], signal.SIGKILL)
                return pid, await kernel.ended()

        pid, ending = asyncio.run(lose())
        assert ending == -signal.SIGKILL
        wait_until(lambda: not is_alive(pid))
        assert run("print(1)", tmp_path)[0] == "warm"  # in the place of the socket that was left
        assert run("print(2)", tmp_path, WarmKernels(wait=False))[0] == "warm"


def test_a_killed_client_takes_its_kernel_along(tmp_path):
    program = ("import asyncio; from pathlib import Path; from aiexec.run.kernels import WarmKernels, running_kernel\n"
               "async def live():\n"
               "    async with running_kernel(WarmKernels(), Path.cwd()) as kernel:\n"
               "        print(kernel.kind, kernel.manager.provisioner.pid, flush=True)\n"
               "        await asyncio.sleep(600)\n"
               "asyncio.run(live())")
    with little_server():
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as client:
            kind, pid = client.stdout.readline().split()
            client.kill()
        assert kind == "warm"
        wait_until(lambda: not is_alive(int(pid)))
        wait_until(lambda: all(lease["pid"] != int(pid) for lease in (warm.status() or {"leases": []})["leases"]))


def test_the_server_leaves_when_nobody_needs_it(tmp_path):
    with little_server(AIEXEC_IDLE="0.5"):
        warm.start()
        pid = warm.status()["pid"]
        wait_until(lambda: not is_alive(pid))
        assert warm.status() is None


def test_stop_waits_for_leases_unless_it_is_forced(tmp_path):
    with little_server():
        async def stop(force: bool) -> tuple[dict, bool, int]:
            async with running_kernel(WarmKernels(), tmp_path) as kernel:
                said, pid = warm.stop(force), kernel.manager.provisioner.pid
                goes_on = not force and (await kernel.client.execute("1", reply=True))["content"]["status"] == "ok"
                return said, goes_on, await kernel.stop()

        assert asyncio.run(stop(False)) == ({"leases": 1}, True, 0)
        assert asyncio.run(stop(True)) == ({"leases": 0}, False, -signal.SIGKILL)


def test_rubbish_does_not_harm_the_server():
    server = warm.status()["pid"]
    for line in (b"\n", b"[]\n", b"{}\n", b'{"kind": "kernel"}\n', b'{"kind": "kernel", "cwd": 1, "environment": 2, "arguments": 3}\n',
                 b"\xff" * 1000 + b"\n", b'{"kind": ["kernel"]}\n'):
        with warm.connect() as channel:
            channel.sendall(line)
            assert "refused" in warm.receive(channel)[0], line
    with warm.connect() as channel:
        channel.sendall(b"half an order")
    assert warm.status()["pid"] == server


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null"])
def test_without_a_runtime_folder_kernels_are_cold(tmp_path, place):
    with patch.dict(os.environ, AIEXEC_RUNTIME=place), WarmKernels() as kernels:
        kind, notice, text = run("print(3)", tmp_path, kernels)
    assert (kind, text) == ("cold", "3\n") and notice


def test_kernels_are_cold_where_there_is_no_fork_and_where_they_are_to_be(tmp_path):
    with patch.object(sys, "platform", "darwin"), WarmKernels() as kernels:
        assert run("print(4)", tmp_path, kernels) == ("cold", "no fork server on darwin", "4\n")
    with patch.dict(os.environ, AIEXEC_KERNELS="cold"), WarmKernels() as kernels:
        assert run("print(5)", tmp_path, kernels) == ("cold", "AIEXEC_KERNELS is cold", "5\n")


def test_a_spare_is_small_and_what_the_server_does_is_told():
    wait_until(lambda: all(spare["ready"] for spare in warm.status()["spares"]) and warm.status()["spares"])
    said = warm.status()
    assert {"pid", "version", "uptime", "preloaded", "leases", "spares"} <= set(said) and "sklearn.ensemble" in said["preloaded"]
    assert all(spare["memory"] < 40 for spare in said["spares"])
