"""A notebook that comes to a bad end: what is recorded, what is kept, and that nothing is left running."""

import base64
import html
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import nbformat
import pytest

from aiexec.errors import LockedError, ParameterError, RunFailed
from aiexec.files import digest
from aiexec.run.kernels import WarmKernels
from aiexec.run.notebook import Cancelled, execute
from aiexec.run.record import MARK

CGROUPS = [place for place in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")) if os.access(place / "cgroup.procs", os.W_OK)]


@pytest.fixture(scope="module")
def warm():
    with WarmKernels() as kernels:
        yield kernels


@pytest.fixture(params=["warm", "cold"])
def kernels(request, warm):
    return warm if request.param == "warm" else WarmKernels(warm=False)


def write(folder: Path, *sources: str, first: str = "a = 1", tags: dict[int, str] | None = None) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in (first, *sources)]
    for index, tag in {0: "parameters", **(tags or {})}.items():
        cells[index].metadata["tags"] = [tag]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "n.ipynb")
    return folder / "n.ipynb"


def run(folder: Path, *sources: str, kernels: WarmKernels | None = None, first: str = "a = 1", tags=None, **options):
    return execute(write(folder, *sources, first=first, tags=tags), folder / "o.ipynb", cwd=folder, kernels=kernels or WarmKernels(warm=False),
                   **options)


def kept(folder: Path) -> nbformat.NotebookNode:
    return nbformat.read(folder / "o.ipynb", 4)


def marks(folder: Path) -> list[str]:
    return [cell.source.split("\n")[0] for cell in kept(folder).cells if MARK in cell.metadata.get("tags", [])]


def shown(folder: Path, cell: int) -> str:
    return "".join(out.get("text", "") for out in kept(folder).cells[cell].outputs)


def alive(folder: Path) -> list[int]:
    """Which of the processes that a notebook noted still run; they are given a moment."""
    until = time.monotonic() + 5
    while True:
        pids = [int(line) for line in (folder / "pids").read_text().split()] if (folder / "pids").exists() else []
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists() and b") Z" not in Path(f"/proc/{pid}/stat").read_bytes()]
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.05)


# each notes its own number, and starts children that cut themselves loose in three ways
FAMILY = """
import os, subprocess, sys, time, signal
def note(pid): open("pids", "a").write(f"{pid}\\n")
note(os.getpid())
note(subprocess.Popen(["sleep", "300"]).pid)
note(subprocess.Popen(["sleep", "300"], start_new_session=True).pid)
deaf = "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.setsid(); open('pids', 'a').write(f'{os.getpid()}\\\\n'); time.sleep(300)"
subprocess.Popen(["sh", "-c", f'"{sys.executable}" -c "{deaf}" & '], start_new_session=True).wait()
while len(open("pids").read().split()) < 4: time.sleep(0.01)
"""
ENDS = {
    "kill": ("os.kill(os.getpid(), 9)", "kernel died (signal 9)"),
    "crash": ("os.kill(os.getpid(), 11)", "kernel died (signal 11)"),
    "exit": ("os._exit(3)", "kernel died (exit 3)"),
    "stop": ("os.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    "lock": ("import ctypes; ctypes.PyDLL(None).sleep(300)", "timeout"),
    "deaf": ("for number in (2, 15): signal.signal(number, signal.SIG_IGN)\nwhile True: pass", "timeout"),
    "error": ("1 / 0", "error in cell"),
}


@pytest.mark.parametrize("end", ENDS)
def test_a_bad_end_is_named_kept_and_leaves_nothing_running(tmp_path, kernels, end):
    code, failure = ENDS[end]
    ended = run(tmp_path, FAMILY, "print('before', flush=True)\n" + code, "a = 3", kernels=kernels,
                tags={2: "timeout=1"} if failure == "timeout" else None)
    assert ended.failure == failure, ended
    assert [cell.status for cell in ended.cells] == ["done", "done", "failed", "not run"]
    assert marks(tmp_path) == [f"**FAILED** · {failure}", "**NOT RUN** · this cell and those below"]
    assert kept(tmp_path).metadata.aiexec.failure == failure
    assert alive(tmp_path) == []


def test_what_a_good_notebook_leaves_behind_ends_as_well(tmp_path, kernels):
    assert run(tmp_path, FAMILY, kernels=kernels).status == "done"
    assert alive(tmp_path) == []


def test_a_notebook_that_forks_on_and_on_is_ended(tmp_path, kernels):
    bomb = ("import os, time\nwhile True:\n    open('pids', 'a').write(f'{os.getpid()}\\n')\n"
            "    if os.fork(): time.sleep(0.05)\n    elif os.fork(): os._exit(0)\n    else: os.setsid()\n"
            "    if len(open('pids').read().split()) > 60: time.sleep(300)")
    ended = run(tmp_path, bomb, kernels=kernels, timeout=3)
    assert ended.failure == "timeout"
    assert alive(tmp_path) == []


def test_a_cell_and_a_notebook_have_their_time(tmp_path, kernels):
    ended = run(tmp_path, "import time; time.sleep(300)", kernels=kernels, tags={1: "timeout=0.5"})
    assert (ended.failure, ended.error) == ("timeout", "the cell did not end within 0.5 s")
    ended = run(tmp_path, "import time; time.sleep(300)", kernels=kernels, timeout=2)
    assert (ended.failure, ended.error) == ("timeout", "the notebook did not end within 2 s")


def test_input_is_refused_at_once(tmp_path, warm):
    ended = run(tmp_path, "input('name?')", kernels=warm)
    assert ended.failure == "error in cell" and "StdinNotImplementedError" in ended.error


# -- memory and figures

EATERS = {
    "slowly": "held = []\nfor _ in range(200): held.append(bytearray(b'x') * 20_000_000); time.sleep(0.02)",
    "at once": "held = bytearray(b'x') * 50_000_000_000",
    "numpy": "import numpy; held = numpy.ones(5_000_000_000)",
    "in a child": "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; x = bytearray(b\"x\") * 900_000_000; time.sleep(60)'])",
}


@pytest.mark.parametrize("eater", EATERS)
def test_memory_beyond_the_limit_is_refused_or_ends_the_notebook(tmp_path, warm, eater):
    ended = run(tmp_path, "import time", EATERS[eater], "b = 1", kernels=warm, memory=600_000_000, timeout=60)
    assert ended.failure == "out of memory", ended
    assert "Memory" in ended.error or "600 MB" in ended.error
    assert ended.cells[-1].status == "not run"


def test_libraries_that_reserve_much_work_under_a_limit(tmp_path, kernels):
    code = ("import numpy, pandas, pyarrow.parquet, pyarrow\nfrom sklearn.ensemble import HistGradientBoostingClassifier\n"
            "x = numpy.random.rand(5000, 5); HistGradientBoostingClassifier(max_iter=3).fit(x, x[:, 0] > 0.5)\n"
            "frame = pandas.DataFrame(x, columns=list('abcde')); frame.to_parquet('x.parquet')\n"
            "assert len(pandas.read_parquet('x.parquet')) == 5000; (x.T @ x).sum()")
    assert run(tmp_path, code, kernels=kernels, memory=700_000_000).status == "done"


if CGROUPS:  # where the tests may make a group with a limit of its own
    def test_a_kernel_killed_by_the_system_is_out_of_memory(tmp_path):
        group = CGROUPS[0] / f"aiexec-test-{os.getpid()}"
        group.mkdir()
        try:
            limit = next(path for path in (group / "memory.limit_in_bytes", group / "memory.max") if path.exists())
            limit.write_text("150000000")
            code = f"import os; open('{group}/cgroup.procs', 'w').write(str(os.getpid())); x = bytearray(b'x') * 900_000_000"
            ended = run(tmp_path, code)
            assert (ended.failure, ended.cells[-1].status) == ("out of memory", "failed")
        finally:
            group.rmdir()


def test_each_cell_tells_what_it_took(tmp_path, warm):
    burn = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'for i in range(20_000_000): pass'])"
    ended = run(tmp_path, burn, "x = bytearray(b'x') * 300_000_000; del x", "b = 1", kernels=warm)
    first, child, large, small = ended.cells
    assert child.usage.cpu > 0.1 > small.usage.cpu
    assert large.usage.memory > small.usage.memory + 200_000_000
    assert ended.usage.memory == large.usage.memory and ended.usage.cpu >= child.usage.cpu and ended.usage.gpu is None
    assert kept(tmp_path).cells[1].metadata.aiexec.cpu == child.usage.cpu
    assert kept(tmp_path).metadata.aiexec.usage.memory == ended.usage.memory
    assert ended.slowest(1)[0] in (child, large)


# -- much output

FLOODS = {
    "lines": "for i in range(100_000): print('x' * 999)",
    "one text": "print('x' * 100_000_000)",
    "displays": "from IPython.display import HTML, display\nfor i in range(50): display(HTML('<p>' + 'x' * 2_000_000))",
    "one display": "from IPython.display import HTML\nHTML('<p>' + 'x' * 100_000_000)",
    "updates": "from IPython.display import HTML, display\nh = display(HTML('a'), display_id=True)\nfor i in range(50): h.update(HTML('x' * 2_000_000))",
}


def test_a_hundred_megabytes_of_output_are_cut_in_bounded_memory(tmp_path):
    script = f"""
import json, resource, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_execution import FLOODS, kept, run, shown
from aiexec.run.kernels import WarmKernels
folder = Path({str(tmp_path)!r})
told = {{}}
with WarmKernels() as kernels:
    run(folder, "a = 2", kernels=kernels)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, code in FLOODS.items():
        ended = run(folder, code, "print('after')", kernels=kernels)
        note = [out.text for out in kept(folder).cells[1].outputs if out.get("name") == "stderr"]
        told[name] = [ended.status, shown(folder, 2), (folder / "o.ipynb").stat().st_size, note]
print(json.dumps([told, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told, grown = json.loads(done.stdout.splitlines()[-1])
    for name, (status, after, size, note) in told.items():
        assert (status, after) == ("done", "after\n"), name
        assert size < 13_000_000, name
        assert name == "updates" or "left out" in note[0], name
    assert grown < 400_000, f"the runner grew by {grown} kB"


def test_an_endless_printer_ends_at_its_time(tmp_path, warm):
    ended = run(tmp_path, "while True: print('x' * 10_000)", kernels=warm, timeout=2)
    assert ended.failure == "timeout"
    assert (tmp_path / "o.ipynb").stat().st_size < 13_000_000


# -- secrets

TELL = """
import base64, html, json, sys, urllib.parse, warnings, logging
from IPython.display import HTML, JSON, SVG, Markdown, display
print(token); print(repr(str(token)), file=sys.stderr); print("a", token, "b", sep="")
for letter in token: print(letter, end="", flush=True)
print(json.dumps({"t": str(token)}), json.dumps(str(token), ensure_ascii=False), ascii(str(token)))
print(urllib.parse.quote(token), urllib.parse.quote(token, safe=""), urllib.parse.urlencode({"t": str(token)}))
for before in ("", "u:", "us:", "user:"): print(base64.b64encode((before + token).encode()).decode(), token.encode().hex())
display(HTML(f"<p title='{html.escape(token)}'>{html.escape(token, quote=False)}</p>"), JSON({str(token): [str(token), {"deep": str(token)}]}))
display(SVG(f"<svg xmlns='http://www.w3.org/2000/svg'><text>{html.escape(token)}</text></svg>"), Markdown(str(token)))
display({"text/plain": str(token), "application/x-own": str(token)}, raw=True, metadata={"text/plain": {"seen": str(token)}})
logging.warning("token %s", token); warnings.warn(str(token))
import pandas as pd
display(pd.DataFrame({"t": [str(token)], "n": [1]}).style, pd.DataFrame({"t": [str(token)]}))
print(pd.DataFrame({"t": [str(token)]}).to_json(), pd.DataFrame({"t": [str(token)]}).to_csv(), str(token).encode())
handle = display("start", display_id=True); handle.update({"text/plain": str(token)}, raw=True)
import ipywidgets; display(ipywidgets.Text(value=str(token)))
"""
NASTY = ["quo'te\"d \\back\\slash", "<b>&amp;</b> & <script>", "ünïcødé-✓-秘密-\U0001f600", "regex.*+?^${}()|[]\\d", "%41%2F+%%s{x}",
         "line one of it\nline two of it\nline three", "tab\tand\\n\\x41 ends", "trailing slash//--''", "12345678901", "{\"json\": \"value\"}"]


def spelled(text: str) -> list[str]:
    lines = [line for line in text.split("\n") if len(line) >= 8]
    both = [text, *lines]
    found = [one for line in both for one in (line, repr(line)[1:-1], json.dumps(line)[1:-1], json.dumps(json.dumps(line)[1:-1])[1:-1],
             html.escape(line), json.dumps(html.escape(line))[1:-1], urllib.parse.quote(line), urllib.parse.quote_plus(line),
             base64.b64encode(line.encode()).decode().rstrip("=")[:-1], line.encode().hex())]
    return [one for one in found if len(one) >= 4]


@pytest.mark.parametrize("number", range(len(NASTY) + 2))
def test_a_secret_is_in_no_file_of_the_run(tmp_path, warm, number):
    letters = random.Random(number)
    text = NASTY[number] if number < len(NASTY) else "".join(letters.choice("aZ09'\"\\<>&%+/= é\t.*[](){}$`~") for _ in range(24)).strip()
    fails = ["raise ValueError(f'no access with {token}')", "eval(str(token) + ' $')", "{}[token]", "int(token + '!')"][number % 4]
    first = 'from aiexec import Secret\ntoken: Secret = Secret("env:NOT_THERE")\na: int = 1'
    ended = run(tmp_path, TELL, "token", fails, kernels=warm, first=first, secrets={"token": "env:TOKEN"}, environment={"TOKEN": text})
    assert ended.failure == "error in cell" and len(ended.cells) == 5, ended
    assert [cell.status for cell in ended.cells] == ["done"] * 4 + ["failed"], ended.error
    assert "Secret('env:TOKEN')" in kept(tmp_path).cells[3].outputs[0].data["text/plain"]
    for path in filter(Path.is_file, tmp_path.rglob("*")):
        there = path.read_text(encoding="utf-8")
        assert [one for one in spelled(text) if one in there] == [], path
    assert not any(one in repr(ended) + str(ended.error) for one in spelled(text))
    assert (tmp_path / "o.ipynb").read_text().count("[secret]") > 30
    assert "env:TOKEN" in kept(tmp_path).cells[1].source and kept(tmp_path).metadata.papermill.parameters.token == "env:TOKEN"


def test_a_secret_does_not_become_an_output(tmp_path, warm):
    first = 'from aiexec import Secret\ntoken: Secret = Secret("file:token.txt")'
    (tmp_path / "token.txt").write_text("battery <staple>\n")
    (tmp_path / "token.txt").chmod(0o600)
    figure = "from matplotlib import pyplot; pyplot.rcParams['svg.fonttype'] = 'none'; b, axes = pyplot.subplots(); axes.set_title(str(token))"
    for code, kind in {"b = f'https://x?t={token}'": "str", "b = {'k': [str(token)]}": "dict", figure: "Figure",
                       "import pandas as pd; b = pd.DataFrame({'t': ['x', str(token)]})": "DataFrame"}.items():
        ended = run(tmp_path, code, kernels=warm, first=first, outputs={"b": kind}, collect_to=tmp_path / "outputs")
        assert (ended.failure, ended.error) == ("output", "output b holds the text of a secret"), code
        assert list((tmp_path / "outputs").iterdir()) == []


def test_a_missing_secret_is_refused_before_anything_starts(tmp_path):
    first = 'from aiexec import Secret\ntoken: Secret = Secret("env:NOT_THERE")'
    with pytest.raises(ParameterError, match="The secret env:NOT_THERE is missing"):
        run(tmp_path, first=first)
    with pytest.raises(ParameterError, match="The secret env:ALSO_NOT is missing"):
        run(tmp_path, first=first, secrets={"token": "env:ALSO_NOT"})
    assert not (tmp_path / "o.ipynb").exists()


# -- the runner itself

RUNNER = """
import sys
from pathlib import Path
from aiexec.run.kernels import WarmKernels
from aiexec.run.notebook import Cancelled, execute
folder = Path(sys.argv[1])
with WarmKernels(warm=sys.argv[2] == "warm") as kernels:
    try:
        execute(folder / "n.ipynb", folder / "o.ipynb", cwd=folder, kernels=kernels, timeout=60)
    except Cancelled as stopped:
        sys.exit(stopped.code)
"""


def runner(folder: Path, kind: str, *sources: str) -> subprocess.Popen:
    write(folder, *sources)
    process = subprocess.Popen([sys.executable, "-c", RUNNER, str(folder), kind], stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not (folder / "ready").exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.02)
    assert (folder / "ready").exists(), process.stderr.read()
    return process


WAITING = FAMILY + "open('ready', 'w').close(); time.sleep(300)"


@pytest.mark.parametrize("kind", ["warm", "cold"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_runner_ends_in_a_record(tmp_path, warm, kind, number):
    process = runner(tmp_path, kind, WAITING, "b = 1")
    process.send_signal(number)
    assert process.wait(30) == 128 + number, process.stderr.read()
    assert marks(tmp_path) == ["**FAILED** · cancelled", "**NOT RUN** · this cell and those below"]
    assert alive(tmp_path) == []


@pytest.mark.parametrize("kind", ["warm", "cold"])
def test_a_runner_that_is_killed_leaves_nothing_running(tmp_path, warm, kind):
    process = runner(tmp_path, kind, WAITING)
    process.kill()
    process.wait(30)
    assert alive(tmp_path) == []
    assert not (tmp_path / "o.ipynb").exists()
    assert run(tmp_path, kernels=warm).status == "done"  # the lock that it held does not stay


def test_another_thread_can_end_an_execution(tmp_path, warm):
    cancel = threading.Event()
    threading.Timer(1.0, cancel.set).start()
    with pytest.raises(Cancelled) as stopped:
        run(tmp_path, "import time; time.sleep(300)", kernels=warm, cancel=cancel)
    assert stopped.value.execution.failure == "cancelled"


# -- files

def test_of_two_executions_to_one_place_the_second_is_refused(tmp_path, warm):
    process = runner(tmp_path, "cold", "open('ready', 'w').close(); import time; time.sleep(2); print('first')")
    with pytest.raises(LockedError, match=f"The execution of n.ipynb to o.ipynb \\(process {process.pid} .* is at work"):
        execute(tmp_path / "n.ipynb", tmp_path / "o.ipynb", cwd=tmp_path, kernels=warm)
    assert process.wait(30) == 0
    assert shown(tmp_path, 1) == "first\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n.ipynb", "o.ipynb", "ready"]


def test_the_source_is_never_changed(tmp_path, warm):
    path = write(tmp_path, "print(a)")
    before = digest(path)
    assert execute(path, tmp_path / "o.ipynb", {"a": 2}, cwd=tmp_path, kernels=warm).status == "done"
    (tmp_path / "link.ipynb").symlink_to(path)
    for same in (path, tmp_path / "link.ipynb"):
        with pytest.raises(ParameterError, match="would replace"):
            execute(path, same, cwd=tmp_path, kernels=warm)
    assert digest(path) == before
    assert execute(path, path, {"a": 3}, cwd=tmp_path, kernels=warm, in_place=True).status == "done"
    assert "3" in path.read_text()


def test_without_room_the_earlier_notebook_stays(tmp_path):
    script = RUNNER.replace("with Warm", "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))\nwith Warm")
    write(tmp_path, "print('x' * 400_000)")
    (tmp_path / "o.ipynb").write_text("earlier")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path), "cold"], capture_output=True, text=True, timeout=60)
    assert "o.ipynb could not be written: File too large." in done.stderr
    assert (tmp_path / "o.ipynb").read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["n.ipynb", "o.ipynb"]


def test_no_folder_to_write_to_is_said(tmp_path, warm):
    (tmp_path / "file").write_text("")
    with pytest.raises((RunFailed, OSError)):
        execute(write(tmp_path), tmp_path / "file" / "o.ipynb", cwd=tmp_path, kernels=warm)


def test_odd_notebooks_come_through(tmp_path, warm):
    path = write(tmp_path, r"print('\ud800')", "from IPython.display import display\ndisplay({'text/plain': 'x'}, raw=True, metadata={'n': float('nan')})")
    nb = json.loads(path.read_text())
    nb["metadata"]["odd"] = [float("nan"), float("inf")]
    nb["cells"][1]["metadata"]["odd"] = float("-inf")
    nb["cells"] += [{"cell_type": "markdown", "id": f"m{i}", "metadata": {}, "source": f"text {i}"} for i in range(10_000)]
    nb["cells"] += [{"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": "", "outputs": [], "execution_count": None} for i in range(500)]
    path.write_text(json.dumps(nb))
    ended = execute(path, tmp_path / "o.ipynb", {"a": 2}, cwd=tmp_path, kernels=warm)
    assert (ended.status, len(ended.cells)) == ("done", 504), ended
    there = json.loads((tmp_path / "o.ipynb").read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert there["metadata"]["odd"] == [None, None]
