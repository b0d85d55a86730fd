"""Every notebook of nbs/ runs from top to bottom, one test a notebook, each in a process of its own."""

import os
from multiprocessing import get_context
from pathlib import Path

import pytest
from nbdev.test import test_nb as run_notebook

run_notebook.__test__ = False
ROOT = Path(__file__).parents[1]


def attempt(path: Path, answer) -> None:
    os.chdir(path.parent)
    for name in [name for name in os.environ if name.startswith("AIEXEC_") and name != "AIEXEC_NO_SKIP"]:
        del os.environ[name]
    ok, seconds = run_notebook(path)
    answer.put(ok)


@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook(path):
    context = get_context("fork")
    answer = context.SimpleQueue()
    child = context.Process(target=attempt, args=(path, answer))
    child.start()
    child.join(300)
    if child.is_alive():
        child.kill()
        pytest.fail(f"{path.name} did not end in 300 s")
    assert child.exitcode == 0 and answer.get(), f"{path.name} failed: its traceback stands above"
