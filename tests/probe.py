# A cell that looks at all that a notebook can notice of its process, for test_kernels.
# Left out, since it differs: process numbers and open descriptors; the exit handlers, path hooks, log handlers and warning filters that a
# library registers when it is imported, and the variables that it sets; the thread that watches for the parent's end; the hash seed.
import asyncio, gc, json, locale, logging, multiprocessing, os, resource, signal, sys, tempfile, threading, time, warnings

import ipykernel.kernelapp

status = dict(line.rstrip("\n").split(":\t", 1) for line in open("/proc/self/status") if ":\t" in line)
app, shell = ipykernel.kernelapp.IPKernelApp.instance(), get_ipython()
try:
    answer = input("? ")
except BaseException as why:
    answer = repr(why)
kept = {name: value for name, value in os.environ.items() if name != "JPY_PARENT_PID"}
seen = {
    "environment": kept, "cwd": os.getcwd(), "path": sys.path, "arguments": [sys.argv[0], sys.argv[1], *sys.argv[3:]],
    "original": [*sys.orig_argv[:4], *sys.orig_argv[5:]], "flags": str(sys.flags), "bytecode": sys.dont_write_bytecode,
    "python": [sys.executable, sys.prefix, sys.version, sys.getrecursionlimit(), sys.getswitchinterval(), sys.warnoptions],
    "umask": status["Umask"], "limits": [resource.getrlimit(getattr(resource, name)) for name in dir(resource) if "RLIMIT_" in name],
    "status": {name: status[name] for name in ("SigBlk", "SigIgn", "SigCgt", "NoNewPrivs", "Cpus_allowed", "Groups", "Seccomp")},
    "nice": os.getpriority(os.PRIO_PROCESS, 0), "signals": {one.name: str(signal.getsignal(one)) for one in signal.Signals},
    "threads": [(one.name, one.daemon) for one in threading.enumerate() if type(one).__name__ != "ParentPollerUnix"],
    "locale": [locale.setlocale(locale.LC_ALL), locale.getpreferredencoding(), sys.getfilesystemencoding(), sys.stdout.encoding],
    "zone": [time.tzname, time.timezone], "filter": str(warnings.filters[0]), "root": [logging.root.level, logging.root.handlers],
    "processes": [multiprocessing.get_start_method(allow_none=True), multiprocessing.current_process().name],
    "loop": [type(asyncio.get_event_loop()).__name__, type(asyncio.get_event_loop_policy()).__name__], "input": answer,
    "names": sorted(name for name in globals() if not name.startswith("_i")), "main": sys.modules["__main__"].__dict__ is shell.user_ns,
    "collector": [gc.isenabled(), gc.get_threshold(), gc.get_debug()], "leader": [os.getpid() == os.getpgrp(), os.getpid() == os.getsid(0)],
    "hooks": [type(sys.displayhook).__name__, type(sys.stdout).__name__, type(sys.stderr).__name__, sys.stdin.fileno(), sys.gettrace()],
    "folders": [tempfile.gettempdir(), [str(one) for one in _dh], [str(one) for one in shell.history_manager.dir_hist]],
    "shell": [type(shell).__name__, shell.execution_count, sorted(shell.extension_manager.loaded), shell.profile, type(app).__name__],
    "history": [str(shell.history_manager.hist_file), shell.history_manager.session_number], "app": [len(app.argv), app.transport],
    "magics": sorted([*shell.magics_manager.magics["line"], *shell.magics_manager.magics["cell"]]),
    "events": {name: [one.__qualname__ for one in calls] for name, calls in shell.events.callbacks.items()},
}
import matplotlib.pyplot as plt

seen["plots"] = [plt.get_backend(), {name: str(value) for name, value in plt.rcParams.items()}]
seen["events, plots imported"] = {name: [one.__qualname__ for one in calls] for name, calls in shell.events.callbacks.items()}
import numpy
import pandas
import sklearn
from pandas._config import config as options

warnings.simplefilter("ignore")  # some options are on their way out
names = [name for name in options._registered_options if name != "display.encoding"]  # 'utf-8' and 'UTF-8'
seen["tables"] = {name: [str(pandas.get_option(name)), str(options._registered_options[name].defval)] for name in names}
seen["numbers"] = [str(numpy.get_printoptions()), numpy.geterr(), str(sklearn.get_config())]
print(json.dumps(seen, default=str))
