from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
facts = parser["DEFAULT"]
setup(
    name=facts["name"],
    version=facts["version"],
    description=facts["description"],
    python_requires=">=" + facts["min_python"],
    install_requires=facts["requirements"].split(),
    packages=find_packages(include=[facts["name"], facts["name"] + ".*"]),
)
