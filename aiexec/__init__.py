__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:  # for editors: nothing is imported until it is asked for
    from aiexec.run.function import notebook
    from aiexec.run.secrets import Secret
    from aiexec.show.forms import form

LATE = {"notebook": "aiexec.run.function", "Secret": "aiexec.run.secrets", "form": "aiexec.show.forms"}  # name → module


def __getattr__(name):
    "What `from aiexec import …` gives, imported when it is first asked for."
    if name not in LATE:
        raise AttributeError(f"module 'aiexec' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(LATE[name]), name)


def __dir__():
    return sorted([*globals(), *LATE])
