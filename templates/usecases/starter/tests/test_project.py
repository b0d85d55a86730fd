"""The project's own checks: its use case is sound and its notebooks run from the data to a scored batch."""

import json
import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def aiexec(*words: str, root: Path = ROOT) -> dict | list:
    "Run one command and return its answer."
    done = subprocess.run(["aiexec", *words, "--json"], cwd=root, capture_output=True, text=True,
                          env={**os.environ, "AIEXEC_ROOT": str(root)})
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_notebooks_and_use_case_are_sound():
    assert aiexec("check") == []


def test_the_pipeline_runs(tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".aiexec", ".venv", ".git"))
    trained = aiexec("run", "{{name}}", "--only", "ingest", "--only", "train", root=root)
    assert trained["steps"]["train"]["outputs"]["roc_auc"] >= 0.9
    version = trained["steps"]["train"]["outputs"]["version"]
    aiexec("promote", "{{name}}", str(version), "--reason", "first version", root=root)
    scored = aiexec("run", "{{name}}", "--only", "score", root=root)
    assert scored["steps"]["score"]["outputs"]["rows"] > 50
