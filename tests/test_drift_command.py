"""Files whose answer is known, made by others than the library's own pages, judged by the command `aiexec drift`."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from tests.conftest import aiexec
from sklearn.datasets import load_breast_cancer, load_wine, make_classification

from aiexec.cli.watching import drift

DRIFTED = ("watch", "act")


def asked(folder: Path, *words: object, code: int = 0) -> dict:
    """What the command prints as plain data."""
    done = CliRunner().invoke(drift, [*map(str, words), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def written(folder: Path, name: str, table: pd.DataFrame) -> Path:
    """A file of the folder: CSV or Parquet by its name."""
    path = folder / name
    table.to_parquet(path) if path.suffix == ".parquet" else table.to_csv(path, index=False)
    return path


def orders(rows: int, seed: int) -> pd.DataFrame:
    """A table as shops have it: numbers of many shapes, categories, truths, keys, moments, long texts, constants."""
    rng = np.random.default_rng(seed)
    return pd.DataFrame({
        "order_id": np.arange(rows) + 1_000_000 * seed,
        "reference": [f"{number:032x}" for number in rng.integers(0, 2**62, rows)],
        "ordered_at": (pd.Timestamp("2024-01-01") + pd.to_timedelta(np.sort(rng.integers(0, 90 * 86400, rows)), unit="s")
                       + pd.Timedelta(days=90 * seed)).strftime("%Y-%m-%d %H:%M:%S"),
        "age": rng.integers(18, 80, rows), "amount": rng.lognormal(3, 1.2, rows).round(2), "balance": rng.standard_t(2, rows),
        "items": rng.poisson(2, rows), "weight": np.where(rng.random(rows) < 0.1, np.nan, rng.gamma(2, 3, rows)),
        "country": rng.choice(["DE", "FR", "US", "GB", "IT"], rows, p=[0.4, 0.2, 0.2, 0.1, 0.1]),
        "city": [f"city {number}" for number in rng.zipf(1.6, rows) % 500], "member": rng.random(rows) < 0.3,
        "rating": rng.integers(1, 6, rows), "currency": "EUR", "version": 3,
        "remark": [None if blank else f"remark {number}" for blank, number in zip(rng.random(rows) < 0.5, rng.integers(0, 10**9, rows))]})


@dataclass(frozen=True)
class Known:
    """A pair of tables and what is true of them."""

    change: Callable[[pd.DataFrame, np.random.Generator], pd.DataFrame]
    drifted: set = field(default_factory=set)  # columns; all others have not
    verdicts: tuple = DRIFTED  # of the whole
    says: str = ""  # a word of the reason
    others: set = field(default_factory=set)  # columns of which either may be said


def replaced(table: pd.DataFrame, chosen: np.ndarray, **values: object) -> pd.DataFrame:
    """The table with other values in the chosen rows."""
    return table.assign(**{name: table[name].where(~chosen, value) for name, value in values.items()})


KNOWN = {
    "unchanged": Known(lambda table, rng: table, verdicts=("none",)),
    "reordered": Known(lambda table, rng: table[table.columns[::-1]].sample(frac=1, random_state=0), verdicts=("none",)),
    "shifted": Known(lambda table, rng: table.assign(age=table.age + 12), {"age"}, ("act",)),
    "scaled": Known(lambda table, rng: table.assign(amount=table.amount * 3), {"amount"}, ("act",)),
    "unit": Known(lambda table, rng: table.assign(weight=table.weight * 1000), {"weight"}, ("act",)),
    "wider": Known(lambda table, rng: table.assign(balance=table.balance * 3), {"balance"}, ("act",)),
    "swapped": Known(lambda table, rng: table.assign(country=table.country.replace({"DE": "IT", "IT": "DE"})), {"country"}, ("act",)),
    "new category": Known(lambda table, rng: replaced(table, rng.random(len(table)) < 0.1, country="ES"), {"country"}, DRIFTED, "ES"),
    "vanished category": Known(lambda table, rng: table.assign(country=table.country.replace({"US": "GB"})), {"country"}, ("act",)),
    "missing": Known(lambda table, rng: replaced(table, rng.random(len(table)) < 0.4, amount=np.nan), {"amount"}, ("act",), "usable"),
    "filled": Known(lambda table, rng: table.assign(weight=table.weight.fillna(table.weight.median())), {"weight"}, DRIFTED),
    "zeros for missing": Known(lambda table, rng: table.assign(weight=table.weight.fillna(0)), {"weight"}, DRIFTED),
    "all missing": Known(lambda table, rng: table.assign(age=np.nan), {"age"}, ("act",)),
    "constant now": Known(lambda table, rng: table.assign(rating=3), {"rating"}, ("act",)),
    "constant moved": Known(lambda table, rng: table.assign(version=4), {"version"}, ("act",)),
    "text constant moved": Known(lambda table, rng: table.assign(currency="USD"), {"currency"}, ("act",)),
    "truth": Known(lambda table, rng: table.assign(member=rng.random(len(table)) < 0.6), {"member"}, ("act",)),
    "counts": Known(lambda table, rng: table.assign(items=rng.poisson(4, len(table))), {"items"}, ("act",)),
    "ratings": Known(lambda table, rng: table.assign(rating=rng.choice([1, 2, 3, 4, 5], len(table), p=[.5, .2, .1, .1, .1])), {"rating"}, ("act",)),
    "two": Known(lambda table, rng: table.assign(age=table.age + 12, country="DE"), {"age", "country"}, ("act",)),
    "gone": Known(lambda table, rng: table.drop(columns="age"), {"age"}, ("act",), "gone"),
    "renamed": Known(lambda table, rng: table.rename(columns={"age": "Age"}), {"age"}, ("act",), "gone", {"Age"}),
    "extra": Known(lambda table, rng: table.assign(colour="red"), others={"colour"}, verdicts=("none",)),
    "texts for numbers": Known(lambda table, rng: table.assign(age=[f"{age} years" for age in table.age]), {"age"}, ("act",)),
    "infinite": Known(lambda table, rng: replaced(table, rng.random(len(table)) < 0.4, balance=np.inf), {"balance"}, ("act",), "usable"),
    "clipped": Known(lambda table, rng: table.assign(amount=table.amount.clip(upper=30)), {"amount"}, ("act",)),
    "texts": Known(lambda table, rng: table.assign(city=[f"town {number}" for number in rng.integers(0, 500, len(table))]), {"city"}, ("act",)),
    "new keys": Known(lambda table, rng: table.assign(order_id=rng.permutation(len(table)) + 77_000_000), verdicts=("none",)),
    "upper case": Known(lambda table, rng: table.assign(country=table.country.str.lower()), {"country"}, ("act",), "de"),
    "spread out, no shift": Known(lambda table, rng: table.sample(frac=0.4, random_state=1), verdicts=("none",)),
}


@pytest.mark.parametrize("ending", ["csv", "parquet"])
@pytest.mark.parametrize("name", KNOWN)
def test_one_changed_column_among_stable_ones(name, ending, tmp_path):
    case = KNOWN[name]
    reference = written(tmp_path, f"reference.{ending}", orders(6000, 1))
    current = written(tmp_path, f"current.{ending}", case.change(orders(5000, 2), np.random.default_rng(9)))
    told = asked(tmp_path, reference, current)
    [window] = told["windows"]
    found = {column for column, of in window["columns"].items() if of["verdict"] in DRIFTED}
    shown = {column: (of["verdict"], of["why"]) for column, of in window["columns"].items()} | {"*": window["multivariate"]["why"]}
    assert found - case.others == case.drifted, shown
    assert told["verdict"] in case.verdicts and told["verdict"] == window["verdict"], (told["verdict"], shown)
    assert all(case.says in window["columns"][column]["why"] for column in case.drifted), shown
    for of in window["columns"].values():
        assert {"kind", "psi", "statistic", "p", "missing", "verdict", "why"} <= set(of)
        assert of["verdict"] in ("none", "watch", "act", "cannot tell") and of["why"].endswith((".", "?"))


# --- what no single column shows


def gaussian(rows: int, correlation: float, seed: int, columns: int = 6) -> pd.DataFrame:
    """Columns that are all the same, of which the first two go together."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(rows, columns))
    table[:, 1] = correlation * table[:, 0] + np.sqrt(1 - correlation**2) * table[:, 1]
    return pd.DataFrame(table, columns=list("abcdefgh")[:columns])


def ring(rows: int, seed: int, crossed: bool) -> pd.DataFrame:
    """Two columns of signs whose product is a third, or is not."""
    rng = np.random.default_rng(seed)
    one, other, third = rng.choice([-1, 1], (3, rows))
    return pd.DataFrame({"one": one, "other": other, "third": third if crossed else one * other, "noise": rng.normal(size=rows)})


@pytest.mark.parametrize("reference, current, verdicts", [
    (gaussian(5000, 0.8, 1), gaussian(5000, 0.8, 2), ("none",)),
    (gaussian(5000, 0.8, 1), gaussian(5000, -0.8, 2), ("act",)),
    (gaussian(5000, 0.8, 1), gaussian(5000, 0.0, 2), ("act",)),
    (gaussian(2000, 0.0, 1), gaussian(2000, 0.7, 2), ("act",)),
    (ring(5000, 1, False), ring(5000, 2, False), ("none",)),
    (ring(5000, 1, False), ring(5000, 2, True), DRIFTED),
], ids=["same", "turned", "broken", "made", "same signs", "crossed signs"])
def test_columns_that_no_longer_go_together(reference, current, verdicts, tmp_path):
    told = asked(tmp_path, written(tmp_path, "a.parquet", reference), written(tmp_path, "b.parquet", current))
    [window] = told["windows"]
    assert {column["verdict"] for column in window["columns"].values()} == {"none"}, window["columns"]
    assert window["multivariate"]["verdict"] in verdicts and told["verdict"] in verdicts, window["multivariate"]


# --- real tables


def halves(table: pd.DataFrame, seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows in two, by chance."""
    mixed = table.sample(frac=1, random_state=seed)
    return mixed.iloc[::2], mixed.iloc[1::2]


def test_halves_of_real_tables_are_the_same_and_kinds_of_wine_are_not(tmp_path):
    for number, data in enumerate((load_breast_cancer(as_frame=True).frame, load_wine(as_frame=True).frame)):
        for seed in range(3):
            one, other = halves(data, seed)
            told = asked(tmp_path, written(tmp_path, "a.csv", one), written(tmp_path, "b.csv", other))
            assert told["verdict"] in ("none", "cannot tell"), (number, seed, told["windows"][0]["multivariate"])
    wine = load_wine(as_frame=True).frame
    told = asked(tmp_path, written(tmp_path, "a.csv", wine[wine.target == 0]), written(tmp_path, "b.csv", wine[wine.target == 1]))
    assert told["verdict"] == "act" and told["windows"][0]["columns"]["alcohol"]["verdict"] == "act"


def test_an_imbalanced_table_with_a_shifted_label(tmp_path):
    features, labels = make_classification(12_000, 10, weights=[0.97], flip_y=0, random_state=1)
    table = pd.DataFrame(features, columns=[f"f{i}" for i in range(10)]).assign(label=labels)
    one, other = halves(table)
    assert asked(tmp_path, written(tmp_path, "a.csv", one), written(tmp_path, "b.csv", other))["verdict"] == "none"
    more = pd.concat([other[other.label == 0].sample(4000, random_state=1), other[other.label == 1].sample(1500, replace=True, random_state=1)])
    told = asked(tmp_path, tmp_path / "a.csv", written(tmp_path, "b.csv", more))
    assert told["verdict"] == "act" and told["windows"][0]["columns"]["label"]["verdict"] == "act"


# --- over time


def over_time(rows: int, at: str, end: str, seed: int = 4) -> pd.DataFrame:
    """A table with moments."""
    rng = np.random.default_rng(seed)
    moments = pd.Series(pd.to_datetime(np.sort(rng.integers(pd.Timestamp(at).value, pd.Timestamp(end).value, rows))))
    return pd.DataFrame({"id": np.arange(rows), "at": moments, "month": moments.dt.month, "value": rng.normal(size=rows),
                         "load": rng.gamma(2, 3, rows), "shop": rng.choice(list("ABCD"), rows)})


@pytest.mark.parametrize("every", ["month", "week", "1000"])
def test_quiet_over_time(every, tmp_path):
    told = asked(tmp_path, written(tmp_path, "t.csv", over_time(24_000, "2023-01-01", "2024-01-01")), "--time", "at", "--every", every)
    assert told["verdict"] == "none", [(window["window"], window["verdict"]) for window in told["windows"]]
    assert len(told["windows"]) == {"month": 9, "week": 40, "1000": 18}[every]


@pytest.mark.parametrize("every, form", [("month", "%Y-%m-%d %H:%M:%S"), ("month", "%d.%m.%Y"), ("1500", "%Y-%m-%dT%H:%M:%SZ"), ("quarter", "%m/%d/%Y")])
def test_gradual_drift_is_told_when_it_is_there_and_not_before(every, form, tmp_path):
    table = over_time(24_000, "2023-01-01", "2024-01-01")
    later = (table["at"] - pd.Timestamp("2023-06-01")).dt.total_seconds().clip(lower=0) / 86400 / 30
    table = table.assign(value=table.value + 0.3 * later, at=table["at"].dt.strftime(form)).sample(frac=1, random_state=1)
    told = asked(tmp_path, written(tmp_path, "t.csv", table), "--time", "at", "--every", every)
    verdicts = [window["verdict"] for window in told["windows"]]
    assert told["verdict"] == "act" and verdicts[-1] == "act" and verdicts[0] == "none", verdicts
    assert sorted(verdicts, key=("none", "watch", "act").index) == verdicts, verdicts
    assert {name for window in told["windows"] for name, column in window["columns"].items() if column["verdict"] in DRIFTED} == {"value"}


def test_a_season_is_no_drift_against_the_same_month_last_year(tmp_path):
    table = over_time(48_000, "2022-01-01", "2024-01-01")
    table["value"] += 2 * np.sin(2 * np.pi * table["at"].dt.day_of_year / 365)  # the reference, half a year, sees only one side of it
    path = written(tmp_path, "t.parquet", table)
    assert asked(tmp_path, path, "--time", "at")["verdict"] in DRIFTED
    told = asked(tmp_path, path, "--time", "at", "--against", "year")
    verdicts = [window["verdict"] for window in told["windows"]]
    assert verdicts == ["cannot tell"] * 12 + ["none"] * 12, verdicts
    assert "act" in [window["verdict"] for window in asked(tmp_path, path, "--time", "at", "--against", "last")["windows"]]


def test_a_reference_of_its_own_and_windows_of_another_file(tmp_path):
    reference = written(tmp_path, "r.csv", over_time(6_000, "2023-01-01", "2023-04-01"))
    table = over_time(9_000, "2023-04-01", "2023-07-01", 7)
    table.loc[table["at"] >= "2023-06-01", "load"] *= 1.8
    told = asked(tmp_path, reference, written(tmp_path, "c.csv", table), "--time", "at", "--every", "month")
    assert [(window["window"], window["verdict"]) for window in told["windows"]] == [("2023-04", "none"), ("2023-05", "none"), ("2023-06", "act")]


# --- what cannot be told


BAD = {
    "no rows": (lambda table: table.head(0), ("cannot tell",)), "one row": (lambda table: table.head(1), ("cannot tell",)),
    "ten rows": (lambda table: table.head(10), ("cannot tell",)), "all missing": (lambda table: table.map(lambda value: None), ("act", "cannot tell")),
    "all columns gone": (lambda table: pd.DataFrame({"other": range(100)}), ("act",)),
    "all constant": (lambda table: table.head(1).loc[[0] * 500], ("act",)),
    "all infinite": (lambda table: table.assign(age=np.inf, amount=-np.inf), ("act",)),
    "mixed types": (lambda table: table.assign(age=[str(age) if age % 2 else "unknown" for age in table.age]), ("act",)),
    "mixed zones": (lambda table: table.assign(ordered_at=[at + ("+02:00" if number % 2 else "Z") for number, at in enumerate(table.ordered_at)]),
                    ("none",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_judged_but_never_called_well(name, tmp_path):
    change, verdicts = BAD[name]
    reference = written(tmp_path, "a.csv", orders(6000, 1))
    told = asked(tmp_path, reference, written(tmp_path, "b.csv", change(orders(5000, 2))))
    assert told["verdict"] in verdicts, {name: (column["verdict"], column["why"]) for name, column in told["windows"][0]["columns"].items()}
    assert all(column["why"] for column in told["windows"][0]["columns"].values())


@pytest.mark.parametrize("rows", [1, 5])
def test_a_reference_of_few_rows_tells_nothing(rows, tmp_path):
    reference = written(tmp_path, "a.csv", orders(rows, 1)[["age", "amount", "country"]])
    assert asked(tmp_path, reference, written(tmp_path, "b.csv", orders(5000, 2)[["age", "amount", "country"]]))["verdict"] == "cannot tell"


@pytest.mark.parametrize("words, sentence", [
    (["missing.csv", "b.csv"], "does not exist"), (["empty.csv", "b.csv"], "is empty"), (["heads.csv", "b.csv"], "has no rows"),
    (["a.csv"], "One table alone"), (["a.csv", "--time", "when"], "no column 'when'"), (["a.csv", "--time", "country"], "holds no moments"),
    (["a.csv", "--time", "ordered_at", "--every", "moon"], "no length of a window"), (["a.csv", "--time", "ordered_at", "--every", "0"], "no length"),
    (["a.csv", "--time", "ordered_at", "--every", "year"], "All rows lie in one year"), (["twice.parquet", "b.csv"], ""),
    (["a.csv", "b.csv", "--ignore", "agee"], "no column 'agee'"), (["a.csv", "b.csv", "--watch", "0.5"], "no bands"),
    (["a.csv", "b.csv", "--against", "year"], "for one file over time"), (["broken.parquet", "b.csv"], "cannot be read"),
    (["a.csv", "notes.txt"], "no known format"),
])
def test_a_question_without_sense_is_refused_in_a_sentence(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = orders(300, 1)
    written(tmp_path, "a.csv", table), written(tmp_path, "b.csv", table), written(tmp_path, "heads.csv", table.head(0))
    for name in ("empty.csv", "notes.txt", "broken.parquet"):
        (tmp_path / name).write_text("" if name == "empty.csv" else "PAR1 no", encoding="utf-8")
    if "twice.parquet" in words:
        (tmp_path / "twice.csv").write_text("age,age\n1,2\n3,4\n", encoding="utf-8")
        words = ["twice.csv", "b.csv"]
        assert asked(tmp_path, *words)["windows"]  # pandas calls the second one age.1
        return
    told = asked(tmp_path, *words, code=1)
    assert sentence in told["error"]["problem"] if isinstance(told.get("error"), dict) else sentence in json.dumps(told), told


def test_the_command_as_a_process_with_its_exit_code(tmp_path):
    table = orders(2000, 1)
    written(tmp_path, "a.csv", table), written(tmp_path, "b.csv", table.assign(age=table.age + 20))
    assert aiexec("drift", "a.csv", "a.csv", "--fail-on", "act", cwd=tmp_path).returncode == 0
    done = aiexec("drift", "a.csv", "b.csv", "--fail-on", "act", cwd=tmp_path)
    assert done.returncode == 1 and done.stdout.startswith("Verdict: act") and "age" in done.stdout and not done.stderr


# --- how quiet, and how sharp


def test_unchanged_windows_are_quiet_and_a_drift_of_a_quarter_is_found(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from drift_simulation import simulated

    quiet = simulated("unchanged", 60, jointly=False)
    assert quiet["act"] + quiet["watch"] <= 0.01 < 0.5 < quiet["naive"], quiet
    for scenario in ("PSI 0.25 in a number", "PSI 0.25 in a category"):
        found = simulated(scenario, 20, jointly=False)
        assert found["found"] >= 0.95 and found["act"] >= 0.85 and found["other column"] <= 0.05, found
    assert simulated("unchanged", 2)["act"] == 0, "all columns together too"
