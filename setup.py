"""Reads the package's facts from settings.ini, the one place where they stand."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(HERE / "settings.ini", encoding="utf-8")
facts = parser["DEFAULT"]

extras = {
    key.removesuffix("_requirements"): value.split()
    for key, value in facts.items()
    if key.endswith("_requirements")
}
extras["all"] = sorted({line for name, lines in extras.items() if name != "dev" for line in lines})

setup(
    name=facts["name"],
    version=facts["version"],
    description=facts["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license=facts["license"],
    author=facts["author"],
    keywords=facts["keywords"].split(),
    python_requires=">=" + facts["min_python"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: Jupyter",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["aiexec", "aiexec.*"]) + ["aiexec.templates"],
    package_dir={"aiexec.templates": "templates"},
    package_data={"aiexec.templates": ["**/*", "**/.gitignore"]},
    install_requires=facts["requirements"].split(),
    extras_require=extras,
    data_files=[("share/jupyter/kernels/aiexec", ["share/jupyter/kernels/aiexec/kernel.json"])],
    entry_points={group: facts[group].split() for group in facts if group == "console_scripts" or "." in group},
)
