"""Keeps compiled programs on disk: a run that is resumed, or repeated with other numbers, compiles nothing again."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import platform

from hybrid_jax.hardware import GIB

LIMIT = int(10 * GIB)  # bytes of the default directory; what was not used for longest is removed


def default_directory() -> pathlib.Path:
    """Returns where compiled programs are kept: a directory of this machine's, as code for a CPU may not run on another one."""
    root = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(root) / "hybrid_jax" / "compiled" / (platform.node() or "here")


def keep_compiled_programs() -> None:
    """Turns on JAX's cache of compiled programs, in `default_directory`, for what takes a second or longer to compile.

    JAX's own variables of the environment decide first: `JAX_COMPILATION_CACHE_DIR` names another directory,
    `JAX_ENABLE_COMPILATION_CACHE=0` turns it off. Of a job of several processes only the first writes, so that without a
    directory that all of them see, the others would compile while it waits for them: such a job has a cache only where the
    variable names one. Call it after `parallel.distributed.initialize` and before anything is compiled.
    """
    import jax

    from hybrid_jax.parallel.distributed import in_job, notice

    given = jax.config.values
    if not given["jax_enable_compilation_cache"] or given["jax_compilation_cache_dir"] is not None or in_job():
        return
    directory = default_directory()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        notice(f"compiled programs are not kept ({error}); set JAX_COMPILATION_CACHE_DIR to a directory that can be written")
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if given["jax_compilation_cache_max_size"] == -1 and importlib.util.find_spec("filelock"):  # JAX limits the size with it only
        jax.config.update("jax_compilation_cache_max_size", LIMIT)
