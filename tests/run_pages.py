"""Runs programs in forks of one process that has imported what most of them need, because imports take longest.

Reads one JSON object per line: the program, its folder, the file for its output and its time limit in seconds. Answers
each with a line: the exit status. Start it with the `-W` options that the programs need.
"""

import builtins
import contextlib
import gc
import importlib
import json
import linecache
import os
import runpy
import shlex
import signal
import sys
import time
import traceback
import types
import warnings

IMPORTED = ["equinox", "flax.linen", "flax.nnx", "jax", "matplotlib.figure", "onstep", "optax"]
IMPORTED += ["orbax.checkpoint", "sklearn.datasets", "tensorboardX"]
"""Not the modules of onstep: a program has to import them."""
NAME = "train.py"
"""What tracebacks and messages call a program, as if a reader had saved it."""


def start(task):
    """Turn this process into one that is about to run the program, and return its code."""
    os.setsid()
    os.chdir(task["folder"])
    output = os.open(task["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    sys.argv, sys.path[0] = [NAME], ""
    linecache.cache[NAME] = (len(task["program"]), None, task["program"].splitlines(keepends=True), NAME)
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__file__, main.__builtins__, main.run_command = NAME, builtins, run_command
    return compile(task["program"], NAME, "exec"), main


def run_command(line):
    """Run a command of a page, of `onstep` or `python SCRIPT`, in this process. An error prints its last lines."""
    words, argv = shlex.split(line.removeprefix("python -m ")), sys.argv
    try:
        if words[0] == "onstep":
            importlib.import_module("onstep.cli").main(words[1:])
        else:
            sys.argv = words[1:]
            linecache.cache.pop(words[1], None)  # the page itself may have the name of the script
            runpy.run_path(words[1], run_name="__main__")
    except Exception as error:
        print(*traceback.format_exception_only(error), sep="", end="")
    finally:
        sys.argv = argv


def wait(process, seconds):
    """Return the exit status of a program, and end it and the processes that it started."""
    end = time.monotonic() + seconds
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.killpg(process, signal.SIGKILL)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(ended[1])


def serve():
    """Run programs until the input ends. Return in the fork of each with its task, and finally with None."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # so that a fork's collections do not copy the memory that it shares
    while line := sys.stdin.readline():
        task = json.loads(line)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about threads: those of the imported libraries survive a fork
            process = os.fork()
        if process == 0:
            return task
        print(wait(process, task["seconds"]), flush=True)
    return None


if __name__ == "__main__" and (task := serve()):
    code, module = start(task)
    exec(code, vars(module))  # at the end of the process's own module, so that it then ends as any other does
