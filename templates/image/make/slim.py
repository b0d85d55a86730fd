"""Takes out of an environment what serving never reads: python3 slim.py /opt/aiexec

Tests, sources of compiled modules, lists of symbols that only a debugger reads, and compiled Python, which `trial.py` makes
again of those modules that serving imports.
"""

import shutil
import struct
import sys
from pathlib import Path

FOLDERS = {"__pycache__", "tests", "sboms", "pkg_resources", "_distutils_hack"}
PLACES = ("setuptools*", "distutils-precedence.pth", "numpy/distutils", "pyarrow/include", "pyarrow/src", "pyarrow/*flight*",
          "sqlalchemy/testing", "sklearn/datasets/data", "sklearn/datasets/images", "sklearn/datasets/descr")
SOURCES = {".pyx", ".pxd", ".pxi", ".pyi", ".tp", ".h", ".hpp", ".c", ".cc", ".cpp", ".a"}


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def strip(path: Path) -> None:
    """Cut an ELF file (64 bits, little-endian) behind its last segment: sections are of no use to the loader, see elf(5)."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        return
    table, (size, count) = struct.unpack_from("<Q", data, 32)[0], struct.unpack_from("<HH", data, 54)
    entries = [table + size * number for number in range(count)]
    segments = [(struct.unpack_from("<Q", data, at + 8)[0], struct.unpack_from("<Q", data, at + 32)[0]) for at in entries]
    end = max(table + size * count, *(start + length for start, length in segments))
    header = data[:40] + bytes(8) + data[48:58] + bytes(6)  # no table of sections
    if end < len(data):
        path.write_bytes(header + data[64:end])


def main(environment: Path) -> None:
    for site in environment.glob("lib/python3*/site-packages"):
        for place in (found for pattern in PLACES for found in list(site.glob(pattern))):
            remove(place)
    paths = [path for path in (environment / "lib").rglob("*") if not path.is_symlink()]
    for path in paths:
        if path.name in FOLDERS and path.is_dir() or path.suffix in SOURCES and path.is_file():
            remove(path)
        elif ".so" in path.suffixes and path.is_file():
            strip(path)


main(Path(sys.argv[1]))
