"""Configuration of all tests."""

import shutil
import signal
import sys
import tempfile
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parent))
collect_ignore = ["pair.py"]  # a program that test_processes.py starts


def pytest_addoption(parser):
    parser.addoption("--steps-per-call", type=int, help="for every engine whose test does not set it")
    parser.addoption("--compile-anew", action="store_true", help="compile every program, even one compiled before")


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background process ignores Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    jax.config.update("jax_num_cpu_devices", 8)  # for meshes; a run without one uses the first device
    if config.option.steps_per_call is not None:
        from onstep import Engine

        Engine.__init__.__kwdefaults__["steps_per_call"] = config.option.steps_per_call
    if not config.option.compile_anew:  # hundreds of tests compile the same few programs
        compiled = tempfile.mkdtemp(prefix="onstep-tests-")  # one folder per process: jax's writes are not atomic
        config.add_cleanup(lambda: shutil.rmtree(compiled, ignore_errors=True))
        jax.config.update("jax_compilation_cache_dir", compiled)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
