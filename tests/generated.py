"""What is made from notebooks beside the library: README.md, and the libraries of the templates.

    python tests/generated.py           say what is out of step
    python tests/generated.py --write   make it anew
"""

import re
import sys
import tempfile
from pathlib import Path

from nbconvert import MarkdownExporter
from nbdev.export import nb_export

ROOT = Path(__file__).parents[1]
LIBRARIES = {"usecases/flight_delays/nbs/features.ipynb": "usecases/flight_delays/flights",
             "usecases/starter/nbs/00_features.ipynb": "usecases/starter/{{name}}"}


def readme() -> str:
    """README.md as nbs/index.ipynb tells it: its pictures and pages are found from the top folder, its code is left out."""
    exporter = MarkdownExporter(exclude_input=True)
    text, _ = exporter.from_filename(str(ROOT / "nbs" / "index.ipynb"))
    text = re.sub(r"\]\((?!https?:|#)", "](nbs/", text).replace("](nbs/../", "](")
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def library(notebook: str) -> str:
    """The module that a template's notebook exports."""
    with tempfile.TemporaryDirectory() as folder:  # laid out as in the project, for the module names its notebook by its path
        copy = Path(folder, "nbs", Path(notebook).name)
        copy.parent.mkdir()
        copy.write_bytes((ROOT / "templates" / notebook).read_bytes())
        nb_export(copy, lib_path=Path(folder, "library"))
        return Path(folder, "library", "features.py").read_text(encoding="utf-8")


def wanted() -> dict[Path, str]:
    """Each file with the text it must have."""
    return {ROOT / "README.md": readme()} | {
        ROOT / "templates" / folder / "features.py": library(notebook) for notebook, folder in LIBRARIES.items()
    }


def main() -> int:
    stale = {path: text for path, text in wanted().items() if not path.is_file() or path.read_text(encoding="utf-8") != text}
    for path, text in stale.items():
        print(("wrote " if "--write" in sys.argv else "out of step: ") + path.relative_to(ROOT).as_posix())
        if "--write" in sys.argv:
            path.write_text(text, encoding="utf-8")
    return bool(stale) and "--write" not in sys.argv


if __name__ == "__main__":
    sys.exit(main())
