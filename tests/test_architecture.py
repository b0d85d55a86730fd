"""The law of the house: who may import whom, where foreign libraries live, and that notebooks and library agree."""

import ast
import configparser
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if re.match(r"\d\d[a-z]?_", path.name))
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
FOREIGN = {
    "papermill": {"run.notebook", "run.engine"},
    "jupyter_client": {"run.kernels", "run.provisioner"},
    "sqlalchemy": {"store"},
    "mlflow": {"model.tracking", "model.trees", "model.registry", "model.mending", "model.loading", "serve.scorer", "serve.models"},
    "cronsim": {"run.schedule", "define.usecase"},
    "skops": {"model.trees", "model.loading", "serve.scorer", "serve.models"},
    "pandera": {"data.contracts"},
    "voila": {"show.dashboards"},
    "click": {"cli"},
    "rich": {"cli"},
    "ipywidgets": {"show"},
    "cloudpickle": {"run.state"},
    "markdown_it": {"run.page"},
    "pygments": {"run.page"},
    "standardwebhooks": {"model.webhooks"},
    "fastapi": {"serve.service"},
    "uvicorn": {"serve.workers"},
    "orjson": {"serve"},
    "apprise": {"monitor.channels"},
}


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def module_of(path: Path) -> str:
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(map(source, cells(path))), re.M)
    assert found, f"{path.name} exports nothing"
    return found[1]


ROOMS = {module_of(path): path for path in NOTEBOOKS}


def imports(module: str) -> set[str]:
    tree = ast.parse((ROOT / "aiexec" / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{module} imports a star"
            # the exporter writes imports within the library relative to the module
            above = ["aiexec", *module.split(".")][: -node.level] if node.level else []
            name = ".".join([*above, *filter(None, [node.module])])
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    return found


def number(module: str) -> str:
    """A house number as in a street: 30, 30a, 30b, 31."""
    return ROOMS[module].name.split("_")[0]


def test_every_notebook_has_a_number_of_its_own():
    numbers = [path.name.split("_")[0] for path in NOTEBOOKS]
    assert len(numbers) == len(set(numbers)), sorted(numbers)
    assert len(NOTEBOOKS) > 30


@pytest.mark.parametrize("module", ROOMS)
def test_a_room_stands_in_its_wing(module):
    path = ROOMS[module]
    wing = path.parent.name
    if wing == "nbs":
        assert "." not in module
    else:
        assert path.name[0] == wing[0]
        allowed = {"show", "export", "cli"} if wing == "9_show" else {wing[2:]}
        assert module.split(".")[0] in allowed


@pytest.mark.parametrize("module", ROOMS)
def test_a_room_imports_only_rooms_with_a_smaller_number(module):
    for other in imports(module):
        name = other.removeprefix("aiexec.")
        if other.startswith("aiexec.") and name in ROOMS:
            assert number(name) < number(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", ROOMS)
def test_a_foreign_library_stays_in_its_room(module):
    for name in imports(module):
        homes = FOREIGN.get(name.split(".")[0])
        if homes:
            assert module in homes or module.split(".")[0] in homes, f"{module} imports {name}"


@pytest.mark.parametrize("module", ROOMS)
def test_a_room_looks_as_the_house_does(module):
    page = cells(ROOMS[module])
    opening = source(page[0])
    assert opening.startswith("# ") and "\n> " in opening, "a title and one quoted sentence open the page"
    exported = [source(cell) for cell in page if re.match(r"#\|\s*export\b", source(cell))]
    assert max(len(text.splitlines()) for text in exported) <= 50
    checks = [cell for cell in page if "test_" in source(cell) or "assert" in source(cell)]
    hidden = [cell for cell in checks if source(cell).startswith("#| hide")]
    assert len(hidden) <= max(1, len(checks) / 5), "show the checks, or move them to tests/"
    lines = (ROOT / "aiexec" / (module.replace(".", "/") + ".py")).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 400
    assert max(map(len, lines)) <= 130


def test_no_module_lacks_its_notebook():
    built = {path.relative_to(ROOT / "aiexec").with_suffix("").as_posix().replace("/", ".")
             for path in (ROOT / "aiexec").rglob("*.py")}
    assert built - {name for name in built if name.split(".")[-1] in ("__init__", "_modidx")} == set(ROOMS)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the tracked files, to run the exporter on without touching the checkout."""
    target = tmp_path_factory.mktemp("copy") / "aiexec"
    for name in TRACKED:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes((ROOT / name).read_bytes())
    return target


def changed(copy: Path) -> list[str]:
    return [name for name in TRACKED if (ROOT / name).is_file() and (copy / name).read_bytes() != (ROOT / name).read_bytes()]


def nbdev(command: str, copy: Path) -> None:
    subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, check=True, capture_output=True, timeout=300)


def test_the_library_is_in_step_with_the_notebooks(copy):
    nbdev("nbdev-export", copy)
    assert changed(copy) == []
    made = {path.relative_to(copy).as_posix() for path in (copy / "aiexec").rglob("*.py")}
    assert made == {name for name in TRACKED if name.startswith("aiexec/") and name.endswith(".py")}


def test_the_notebooks_are_clean_and_keep_their_tags(copy):
    nbdev("nbdev-clean", copy)
    subprocess.run([Path(sys.executable).with_name("nbdev-clean"), "--fname", "templates"], cwd=copy, check=True, timeout=300)
    assert changed(copy) == []
    tagged = [name for name in TRACKED if name.startswith("templates/usecases/") and name.endswith(".ipynb")
              and any("parameters" in cell["metadata"].get("tags", []) for cell in cells(copy / name))]
    assert len(tagged) >= 6


def test_the_name_stands_equal_in_both_files():
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert parser["DEFAULT"]["name"] == project["name"]
    version = re.search(r'__version__ = "(.+)"', (ROOT / "aiexec/__init__.py").read_text(encoding="utf-8"))[1]
    assert parser["DEFAULT"]["version"] == version


def test_no_file_names_a_place_on_one_machine():
    pattern = re.compile(r"/(?:home|Users|root|work|farm)/\w|/tmp/\w|[A-Z]:\\\\Users")
    for name in TRACKED:
        path = ROOT / name
        if path.suffix in {".ipynb", ".py", ".md", ".yaml", ".yml", ".ini", ".toml", ".txt", ""} and path.is_file():
            if name != "tests/test_architecture.py":
                found = pattern.search(path.read_text(encoding="utf-8", errors="replace"))
                assert not found, f"{name}: {found[0]}"


@pytest.mark.parametrize("code", ["import aiexec", "from aiexec.cli.commands import main; main(['--help'], standalone_mode=False)"])
def test_what_must_answer_at_once_loads_nothing_heavy(code):
    heavy = ["pandas", "numpy", "mlflow", "papermill", "sklearn", "sqlalchemy", "plotly", "nbformat", "pydantic", "pyarrow"]
    program = f"{code}\nimport sys; loaded = [m for m in {heavy} if m in sys.modules]; assert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["run.runner", "model.webhooks", "monitor.telling"])
def test_what_every_run_needs_loads_no_frames(module):
    program = f"import aiexec.{module}, sys; loaded = {{'pandas', 'numpy', 'mlflow', 'apprise'}} & {{*sys.modules}}; assert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
