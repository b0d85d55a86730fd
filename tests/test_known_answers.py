"""Tables of many makers and shapes whose answer is known beforehand, judged by `aiexec drift` and `aiexec performance`."""

import datetime
import decimal
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from sklearn.datasets import load_digits

from aiexec.cli.watching import drift, performance

DRIFTED = ("watch", "act")


def refused(word: str) -> None:
    """JSON knows no NaN."""
    raise AssertionError(f"{word} is no JSON")


def asked(verb, *words: object, code: int = 0) -> dict:
    """What a verb prints as plain data, and nothing else."""
    done = CliRunner().invoke(verb, [*map(str, words), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout, parse_constant=refused)


def written(folder: Path, name: str, table: pd.DataFrame | pa.Table) -> Path:
    """A file of the folder."""
    path = folder / name
    if isinstance(table, pa.Table):
        pq.write_table(table, path)
    else:
        table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)
    return path


def drifted(folder: Path, before: object, now: object, *words: object) -> tuple[str, set]:
    """The verdict, and the columns that have drifted."""
    told = asked(drift, written(folder, "before.parquet", before), written(folder, "now.parquet", now), *words)
    return told["verdict"], {name for window in told["windows"] for name, of in window["columns"].items() if of["verdict"] in DRIFTED}


def plain(rows: int, seed: int) -> pd.DataFrame:
    """Numbers, words and truths that stay as they are."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"a": rng.normal(50, 10, rows), "b": rng.gamma(2, 3, rows), "c": rng.choice(["red", "green", "blue"], rows, p=[.5, .3, .2]),
                         "d": rng.integers(0, 10, rows), "flag": rng.random(rows) < 0.3})


BEFORE, NOW = plain(6000, 1), plain(4000, 2)
RNG = np.random.default_rng(3)
CHANGES = {
    "mean and spread kept, shape not": (NOW.assign(a=50 + 10 * (RNG.choice([-1, 1], 4000) * .95 + RNG.normal(0, .31, 4000))), "a"),
    "spread only": (NOW.assign(a=50 + (NOW.a - 50) * 2), "a"), "tails only": (NOW.assign(a=NOW.a.where(RNG.random(4000) > .05, 500)), "a"),
    "another unit": (NOW.assign(a=NOW.a * 9 / 5 + 32), "a"), "sign": (NOW.assign(a=-NOW.a), "a"),
    "a mark for missing": (NOW.assign(a=NOW.a.where(RNG.random(4000) > .1, -999)), "a"), "label": (NOW.assign(flag=RNG.random(4000) < .6), "flag"),
    "a word vanished": (NOW[NOW.c != "blue"], "c"), "codes turned": (NOW.assign(d=9 - RNG.integers(0, 10, 4000)**2 // 10), "d"),
    "a tiny shift": (NOW.assign(a=NOW.a + 1), None), "copies of rows": (pd.concat([NOW.head(400)] * 10), None), "sorted": (NOW.sort_values("a"), None),
    "whole numbers with a point": (NOW.assign(d=NOW.d.astype(float)), None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_is_found_in_its_column_and_no_change_is_none(name, tmp_path):
    table, column = CHANGES[name]
    verdict, columns = drifted(tmp_path, BEFORE, table)
    assert columns == ({column} if column else set()) and (verdict in DRIFTED if column else verdict == "none"), (verdict, columns)


# --- no change where rows are few, columns hardly vary, or values are seldom known


def test_halves_of_handwritten_digits_are_the_same(tmp_path):
    digits = load_digits(as_frame=True).frame  # many pixels are nought in all but a handful of rows
    for seed in range(3):
        mixed = digits.sample(frac=1, random_state=seed)
        assert drifted(tmp_path, mixed.iloc[::2], mixed.iloc[1::2])[0] in ("none", "cannot tell")


def test_a_correlation_of_a_handful_of_known_values_says_nothing(tmp_path):
    rng = np.random.default_rng(4)
    tables = [plain(2000, seed).assign(speed=lambda t: t.a.where(rng.random(len(t)) < 0.007) * sign) for seed, sign in ((1, 1), (2, 1.0))]
    tables[1].loc[tables[1].speed.notna(), "speed"] = rng.permutation(tables[1].speed.dropna())
    assert drifted(tmp_path, *tables) == ("cannot tell", set())  # the column of 14 values cannot be told


def test_noise_of_many_sizes_is_quiet(tmp_path):
    alarms = [(rows, seed) for rows in (30, 200, 1000) for seed in range(4) if drifted(tmp_path, plain(rows, 2 * seed), plain(rows, 2 * seed + 1))[0] in DRIFTED]
    assert not alarms


def test_columns_that_go_with_each_other_no_longer(tmp_path):
    rng = np.random.default_rng(5)
    x, y, z, noise = rng.normal(size=(4, 3000))
    before, now = pd.DataFrame({"x": x, "y": .9 * x + .44 * noise}), pd.DataFrame({"x": y, "y": .45 * y + .89 * z})
    assert drifted(tmp_path, before, now)[0] in DRIFTED
    assert drifted(tmp_path, before.head(1500), before.tail(1500)) == ("none", set())


# --- over time


def test_one_bad_month_and_a_season_of_the_reference(tmp_path):
    rng = np.random.default_rng(6)
    at = pd.Series(pd.date_range("2022-01-01", "2023-12-31", periods=16_000))
    table = pd.DataFrame({"at": at, "a": rng.normal(50, 10, 16_000), "c": rng.choice(list("xyz"), 16_000), "b": rng.gamma(2, 3, 16_000)})
    bad = (at >= "2023-05-01") & (at < "2023-06-01")
    told = asked(drift, written(tmp_path, "t.parquet", table.assign(b=table.b.where(~bad, table.b * 3))), "--time", "at", "--every", "Month")
    assert {window["window"]: window["verdict"] for window in told["windows"] if window["verdict"] != "none"} == {"2023-05": "act"}
    season = table.assign(a=table.a + 15 * np.cos(2 * np.pi * at.dt.day_of_year / 365))
    told = asked(drift, written(tmp_path, "r.parquet", season[at < "2023"]), written(tmp_path, "c.parquet", season[at >= "2023"]), "--time", "at")
    assert told["verdict"] == "none", [(window["window"], window["multivariate"]["why"]) for window in told["windows"] if window["verdict"] != "none"]


@pytest.mark.parametrize("form", ["%b %d %Y", "%d.%m.%y", "%A, %d %B %Y", "seconds", "years", "%Y-%m-%d ?"])
def test_moments_as_people_write_them(form, tmp_path):
    at = pd.Series(pd.date_range("2019-01-01", "2022-12-31", periods=2000))
    texts = {"seconds": lambda: (at - pd.Timestamp(0)).dt.total_seconds(), "years": lambda: at.dt.year}.get(form, lambda: at.dt.strftime(form.strip(" ?")))()
    texts = texts.where(at.index % 25 > 0, "soon") if "?" in form else texts
    told = asked(drift, written(tmp_path, "t.csv", plain(2000, 3).assign(when=texts)), "--time", "when", "--every", "year")
    assert [window["window"] for window in told["windows"]] == ["2020", "2021", "2022"] and told["verdict"] == "none"
    assert bool(told["notes"]) == ("?" in form), told["notes"]


def test_windows_of_rows_on_one_day_keep_their_names_apart(tmp_path):
    table = plain(2000, 3).assign(day=np.repeat(["2024-01-01", "2024-01-02"], 1000))
    told = asked(drift, written(tmp_path, "t.csv", table), "--time", "day", "--every", "250 rows")
    assert len({window["window"] for window in told["windows"]}) == len(told["windows"]) == 6


# --- files as they come


def columns_of(make) -> list[pa.Table]:
    """Two tables with one special column, from the same source."""
    return [pa.table({"x": make(np.random.default_rng(seed)), "z": np.random.default_rng(seed + 9).normal(size=1500)}) for seed in (1, 2)]


SPECIAL = {
    "lists": lambda rng: pa.array([rng.integers(0, 9, 2).tolist() for _ in range(1500)]), "records": lambda rng: pa.array([{"u": int(rng.integers(9))} for _ in range(1500)]),
    "decimals": lambda rng: pa.array([decimal.Decimal(int(value)) / 100 for value in rng.integers(0, 9999, 1500)]),
    "durations": lambda rng: pa.array([datetime.timedelta(seconds=int(value)) for value in rng.integers(0, 9999, 1500)]),
    "hours": lambda rng: pa.array([datetime.time(int(value)) for value in rng.integers(0, 24, 1500)]),
    "zoned": lambda rng: pa.array(pd.date_range("2024-01-01", periods=1500, freq="h", tz="America/New_York")),
    "dictionary": lambda rng: pa.array(rng.choice(["u", "v"], 1500)).dictionary_encode(), "large": lambda rng: pa.array(rng.choice(["u", "v"], 1500)).cast(pa.large_string()),
    "nothing": lambda rng: pa.nulls(1500),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_parquet_of_every_kind_is_read(name, tmp_path):
    assert drifted(tmp_path, *columns_of(SPECIAL[name])) == ("none", set())


def test_longer_durations_are_drift(tmp_path):
    before, now = columns_of(SPECIAL["durations"])
    now = now.set_column(0, "x", pa.array([datetime.timedelta(seconds=value + 5000) for value in range(1500)]))
    assert drifted(tmp_path, before, now) == ("act", {"x"})


def test_texts_with_semicolons_are_the_same_table(tmp_path):
    before = written(tmp_path, "before.csv", BEFORE.head(800))
    NOW.head(800).to_csv(tmp_path / "now.csv", index=False, sep=";", decimal=",", encoding="utf-8-sig")
    NOW.head(800).to_csv(tmp_path / "now.tsv", index=False, sep="\t")
    assert [asked(drift, before, tmp_path / name)["verdict"] for name in ("now.csv", "now.tsv")] == ["none", "none"]


def test_what_cannot_be_read_is_refused_in_a_sentence(tmp_path):
    before = written(tmp_path, "before.csv", BEFORE.head(300))
    (tmp_path / "latin.csv").write_bytes("a,b\n1,blüe\n".encode("latin-1"))
    (tmp_path / "folder.parquet").mkdir()
    written(tmp_path, "twice.parquet", pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]))
    for name, word in (("latin.csv", "UTF-8"), ("folder.parquet", "is a folder"), ("twice.parquet", "are named 'a'")):
        assert word in asked(drift, before, tmp_path / name, code=1)["problem"]
    assert "--time" in asked(drift, before, before, "--every", "week", code=1)["remedy"]


# --- performance


def loans(rows: int, seed: int, rule: float = 1.0, shift: float = 0.0) -> pd.DataFrame:
    """Scores of a model that knew the rule, and what came of it."""
    rng = np.random.default_rng(seed)
    income, debt = rng.normal(shift, 1, rows), rng.normal(size=rows)
    chance = 1 / (1 + np.exp(1 - rule * (1.2 * income - 1.5 * debt)))
    return pd.DataFrame({"id": range(rows), "at": pd.date_range("2023-01-01", periods=rows, freq="h").astype(str), "income": income,
                         "score": 1 / (1 + np.exp(1 - 1.2 * income + 1.5 * debt)), "bad": (rng.random(rows) < chance).astype(int)})


GOOD = loans(6000, 1)


def judged(folder: Path, now: pd.DataFrame, before: pd.DataFrame = GOOD, *words: object, target: str = "bad", score: str = "score") -> dict:
    """What is said of one table against good days."""
    return asked(performance, written(folder, "now.parquet", now), "--reference", written(folder, "before.parquet", before), "--target", target, "--score", score, *words)


@pytest.mark.parametrize("shift", [-1.0, 1.0, 2.0])
def test_an_estimate_follows_inputs_that_moved(shift, tmp_path):
    from sklearn.metrics import roc_auc_score

    now = loans(20_000, 5, shift=shift)
    figure = judged(tmp_path, now.assign(bad=np.nan))["windows"][0]["metrics"]["roc_auc"]
    assert figure["by"] == "estimated" and abs(figure["estimated"] - roc_auc_score(now.bad, now.score)) < 0.012, figure


def animals(rows: int, seed: int, right: float = 0.85) -> pd.DataFrame:
    """Classes, and what a model said: in words, in codes, and how sure it was of cats."""
    rng = np.random.default_rng(seed)
    was = rng.choice(["cat", "cow", "dog"], rows)
    said = np.where(rng.random(rows) < right, was, rng.choice(["cat", "cow", "dog"], rows))
    codes = {"cat": 0, "cow": 1, "dog": 2}
    return pd.DataFrame({"was": was, "said": said, "was_code": pd.Series(was).map(codes), "said_code": pd.Series(said).map(codes),
                         "cat": np.where(said == "cat", .8, .1) + rng.uniform(-.1, .1, rows)})


@pytest.mark.parametrize("target, score, words", [("was", "said", []), ("was_code", "said_code", []), ("was", "cat", ["--positive", "cat"])])
def test_many_classes(target, score, words, tmp_path):
    before = animals(3000, 1)
    verdicts = [judged(tmp_path, animals(3000, 2, right), before, *words, target=target, score=score)["verdict"] for right in (0.85, 0.3)]
    assert verdicts == ["none", "act"]


def test_decisions_in_words(tmp_path):
    tables = [pd.DataFrame({"bad": np.where(table.bad == 1, "yes", "no"), "said": np.where(table.score > 0.5, "yes", "no")}) for table in (GOOD, loans(4000, 2), loans(4000, 2, -1.0))]
    assert [judged(tmp_path, table, tables[0], score="said")["verdict"] for table in tables[1:]] == ["none", "act"]


def test_errors_of_a_category_are_expected_before_labels(tmp_path):
    rng = np.random.default_rng(7)
    kind = rng.choice(["a", "b"], 6000)
    table = pd.DataFrame({"kind": kind, "said": rng.normal(10, 3, 6000)}).assign(was=lambda t: t.said + rng.normal(size=6000) * np.where(kind == "a", 1, 4))
    hard = table[table.kind == "b"]
    figure = judged(tmp_path, hard.assign(was=np.nan), table, target="was", score="said")["windows"][0]["metrics"]["mean_absolute_error"]
    assert figure["verdict"] == "watch" and abs(figure["estimated"] - (hard.was - hard.said).abs().mean()) < 0.2, figure


def test_ids_of_another_type_strangers_and_labels_older_than_their_predictions(tmp_path):
    now = loans(4000, 2)
    labels = pd.DataFrame({"id": now.id.astype(str), "bad": now.bad, "at": np.where(now.id < 1000, "2020-01-01", "2024-01-01")})
    words = ["--labels", written(tmp_path, "labels.parquet", labels), "--on", "id", "--time", "at", "--every", "year"]
    told = judged(tmp_path, now.drop(columns="bad"), GOOD, *words)
    assert told["windows"][0]["labelled"] == 3000 and "1,000 labels are older" in told["notes"][0]
    scored = written(tmp_path, "scored.parquet", now.drop(columns="bad"))
    for changed, words in ((labels.assign(id="L" + labels.id), "None of 4,000 labels"), (labels.assign(at="2020-01-01"), "4,000 labels are older")):
        path = written(tmp_path, "labels.parquet", changed)
        told = asked(performance, scored, "--target", "bad", "--score", "score", "--labels", path, "--on", "id", "--time", "at", code=1)
        assert words in told["problem"]


def test_a_score_that_ranks_the_wrong_way_is_told_so(tmp_path):
    told = judged(tmp_path, loans(3000, 2).assign(score=lambda t: 1 - t.score), GOOD.assign(score=1 - GOOD.score))
    assert told["verdict"] == "cannot tell" and "no better than a guess" in told["windows"][0]["why"]
