"""As many rows as there are: scored in parts, gone on with after a kill, the same scores as everywhere else."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier

from aiexec.data.sources import read_frame
from aiexec.model.registry import promote, register
from aiexec.serve.batch import score_batch
from aiexec.serve.predictions import predictions_folder, read_predictions
from aiexec.serve.scorer import load_scorer
from aiexec.serve.scoring import open_output
from aiexec.settings import Settings
from aiexec.store import open_ledger

from .conftest import AIEXEC, aiexec, answer, environment, new_database

ROWS = 40_000


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project with two versions of a model that takes numbers and a category, the first of them champion; and rows in three forms."""
    place = tmp_path_factory.mktemp("batch") / "project"
    place.mkdir()
    (place / "settings.ini").write_text("[aiexec]\nactor = ada\nkernels = cold\n")
    ledger = open_ledger(Settings(place, actor="ada"))
    chance = np.random.default_rng(0)
    rows = pd.DataFrame({f"x{number}": chance.normal(size=ROWS) for number in range(6)})
    rows.loc[::7, "x3"] = np.nan
    target = (rows["x0"] + chance.normal(size=ROWS) > 0).astype(int)
    for depth in (3, 4):
        model = HistGradientBoostingClassifier(max_iter=20, max_depth=depth).fit(rows, target)
        register("risk", model, rows, metrics={"roc_auc": 0.7}, trained_on={"depth": depth}, ledger=ledger)
    promote("risk", 1, reason="first model", ledger=ledger)
    rows.insert(0, "case", [f"case-{number:06}" for number in range(ROWS)])
    (place / "in").mkdir()
    for number, month in enumerate(["2013-04", "2013-05", "2013-06", "2013-07"]):
        (place / "in" / f"month={month}").mkdir()
        rows[number * 10_000:(number + 1) * 10_000].to_parquet(place / "in" / f"month={month}" / "rows.parquet", row_group_size=3000)
    rows.to_csv(place / "rows.csv", index=False)
    with sqlite3.connect(place / "shop.db") as connection:
        rows.sample(frac=1, random_state=1).to_sql("cases", connection, index=False)
    return place


def expected(rows: pd.DataFrame, project: Path) -> pd.DataFrame:
    """What the library's scorer says, by id."""
    scorer = load_scorer("risk", 1, Settings(project))
    return score_batch(scorer, rows, rows["case"]).set_index("prediction_id").sort_index()


def scored(frame: pd.DataFrame) -> pd.DataFrame:
    """Scores by id, each once."""
    assert frame["prediction_id"].is_unique
    return frame.set_index("prediction_id").sort_index()


@pytest.mark.parametrize("name", ["in", "in/*/rows.parquet", "rows.csv", "sqlite:///shop.db#cases", "sqlite:///shop.db#SELECT * FROM cases"])
def test_all_kinds_of_input_give_the_scores_of_the_library(project, tmp_path, name):
    out = tmp_path / "scores"
    done = answer("score", "risk", "--input", name, "--id", "case", "--output", out, "--rows", 1500, "--no-log", cwd=project)
    assert done["rows"] == ROWS and done["kept"] == 0
    found = scored(pd.read_parquet(out, partitioning=None))
    csv = name.endswith(".csv")
    known = expected(read_frame(project / "rows.csv") if csv else pd.read_parquet(project / "in").drop(columns="month"), project)
    pd.testing.assert_series_equal(found["score"], known["score"], check_exact=True)
    assert set(found["model"]) == {"risk"} and set(found["model_version"]) == {"1"}
    assert set(found["model_digest"]) == {load_scorer("risk", 1, Settings(project)).digest}
    assert found["scored_at"].str.endswith("Z").all()
    manifest = json.loads((out / "_manifest.json").read_text())
    assert manifest["state"] == "complete" and sum(file["rows"] for file in manifest["files"]) == ROWS


def test_the_service_log_has_what_batch_scored_and_a_partition_is_a_part_of_it(project, tmp_path):
    copy = tmp_path / "project"
    shutil.copytree(project, copy)
    done = answer("score", "risk/1", "--input", "in", "--where", "month=2013-05", "--id", "case", "--output", "one.parquet", cwd=copy)
    assert done["rows"] == 10_000
    log = scored(read_predictions(predictions_folder("risk", Settings(copy))))
    rows = pd.read_parquet(copy / "in" / "month=2013-05" / "rows.parquet").set_index("case").sort_index()
    pd.testing.assert_frame_equal(log[rows.columns], rows, check_names=False, check_exact=True)
    file = scored(pd.read_parquet(copy / "one.parquet"))
    assert log["score"].tolist() == file["score"].tolist() == expected(rows.reset_index(), copy)["score"].tolist()
    assert set(log["role"]) == {"batch"} and set(log["version"]) == {"1"}


def begin(project: Path, *words: object) -> subprocess.Popen:
    return subprocess.Popen([AIEXEC, "score", "risk", *map(str, words)], cwd=project, env=environment(AIEXEC_KERNELS="cold"),
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def test_a_killed_scoring_goes_on_with_the_parts_that_are_missing(project, tmp_path):
    copy, out = tmp_path / "project", tmp_path / "project" / "scores"
    shutil.copytree(project, copy)
    words = ("--input", "in", "--id", "case", "--output", "scores", "--rows", 100)
    process = begin(copy, *words)
    until = time.monotonic() + 120
    while len(list(out.rglob("part-*.parquet"))) < 3 and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.005)
    assert process.poll() is None, "it ended before it was killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    lines = [json.loads(line) for line in (out / "_journal.jsonl").read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    before = {line["file"]: (out / line["file"]).stat().st_mtime_ns for line in lines}
    assert len(before) >= 2
    for path in out.rglob("part-*.parquet"):  # never a half file
        assert pq.read_metadata(path).num_rows == 1000
    done = answer("score", "risk", *words, cwd=copy)
    assert (done["rows"], done["parts"], done["kept"]) == (ROWS, 40, len(before))
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    known = expected(pd.read_parquet(copy / "in").drop(columns="month"), copy)
    pd.testing.assert_series_equal(scored(pd.read_parquet(out, partitioning=None))["score"], known["score"], check_exact=True)
    assert len(scored(read_predictions(predictions_folder("risk", Settings(copy))))) == ROWS
    assert not [path for path in copy.rglob(".*-*-*.parquet")], "what the killed process left is swept"


def test_a_promotion_between_two_starts_does_not_mix_versions(project, tmp_path):
    copy = tmp_path / "project"
    shutil.copytree(project, copy)
    ledger = open_ledger(Settings(copy, actor="ada"))
    words = ("score", "risk", "--input", "in", "--id", "case", "--output", "scores", "--rows", 1000, "--no-log")
    answer(*words, cwd=copy)
    manifest = copy / "scores" / "_manifest.json"
    manifest.write_text(manifest.read_text().replace('"complete"', '"unfinished"'))  # as it stands in the middle
    (copy / "scores" / "month=2013-07" / "part-00003.parquet").unlink()
    promote("risk", 2, reason="better", ledger=ledger)
    refused = answer(*words, cwd=copy, code=1)
    assert "holds the first scores of risk version 1" in refused["problem"] and "aiexec score risk/1" in refused["remedy"]
    done = answer("score", "risk/1", *words[2:], cwd=copy)
    assert (done["kept"], done["parts"]) == (3, 4)
    assert set(pd.read_parquet(copy / "scores", partitioning=None)["model_version"]) == {"1"}
    assert "Choose another place" in answer(*words, cwd=copy, code=1)["remedy"]
    assert answer(*words, "--afresh", cwd=copy)["kept"] == 0
    assert set(pd.read_parquet(copy / "scores", partitioning=None)["model_version"]) == {"2"}


@pytest.mark.parametrize("spoil, words", [
    (lambda rows: rows.drop(columns="x2"), ["risk version 1 needs the columns x2, which", "lacks"]),
    (lambda rows: rows.assign(x2="high"), ["risk version 1 needs 'x2' as double"]),
    (lambda rows: rows.drop(columns="case"), ["has no column 'case' for the ids"]),
    (lambda rows: rows.assign(case=rows["case"].where(rows.index != 777)), ["Row 777 of", "has no prediction id"]),
    (lambda rows: rows.assign(case=rows["case"].where(rows.index != 1777, "case-030003")), ["'case-030003' stands twice", "row 1777 of"]),
    (lambda rows: rows.iloc[:0], []),
    (None, ["cannot be read"]),
])
def test_bad_input_is_refused_before_anything_is_written(project, tmp_path, spoil, words):
    shutil.copytree(project / "in", tmp_path / "in")
    path = tmp_path / "in" / "month=2013-04" / "rows.parquet"
    if spoil:
        spoil(pd.read_parquet(path)).to_parquet(path, row_group_size=3000)
    else:
        path.write_bytes(path.read_bytes()[:10_000])
    inputs = tmp_path / "in" if words else path
    done = aiexec("score", "risk", "--input", inputs, "--id", "case", "--output", tmp_path / "out", "--rows", 1000, "--json", cwd=project)
    assert done.returncode == 1, done.stdout
    problem = json.loads(done.stdout)["problem"]
    assert all(word in problem for word in words or ["has no rows"]), problem
    assert not (tmp_path / "out").exists()


def test_two_at_once_into_one_place_are_one_and_a_refusal(project, tmp_path):
    words = ("score", "risk", "--input", "in", "--where", "month=2013-04", "--id", "case", "--output", tmp_path / "scores", "--no-log")
    with open_output(str(tmp_path / "scores")).held():
        assert "is at work on this" in answer(*words, cwd=project, code=1)["problem"]
    assert answer(*words, cwd=project)["rows"] == 10_000


def test_postgres_takes_and_gives_rows(project, server, tmp_path):
    url = new_database(server, "batch")
    from aiexec.store import connect

    engine = connect(url)
    rows = pd.read_csv(project / "rows.csv")
    rows.head(5000).to_sql("cases", engine, index=False)
    words = ("score", "risk", "--input", f"{url}#cases", "--id", "case", "--output", f"{url}#scores", "--rows", 100, "--no-log")
    assert answer(*words, cwd=project)["rows"] == 5000
    assert answer(*words, cwd=project)["kept"] == 5
    found = scored(pd.read_sql_table("scores", engine))
    pd.testing.assert_series_equal(found["score"], expected(rows.head(5000), project)["score"], check_exact=True)
    engine.dispose()
