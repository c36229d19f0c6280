"""Benchmark of conversion: `python -m hybrid_jax.convert.bench DIRECTORY [--model Qwen/Qwen3-8B] [--layers N]`.

A checkpoint of random bfloat16 numbers in the shape of a public model is made in DIRECTORY (its size is needed three times on the
disk), copied as files, read into our layout, and converted, each in a process of its own. Printed are the seconds, the speed and
its ratio to that of copying, and the largest memory of the process. The pages of the files are dropped from memory before each.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import jax.numpy as jnp
import numpy as np

from hybrid_jax.convert.load import open_parameters
from hybrid_jax.convert.save import MAX_SHARD_BYTES, planned_tensors
from hybrid_jax.convert.writer import WeightWriter
from hybrid_jax.families import config_from_hf, config_to_hf
from hybrid_jax.families.public import PUBLIC
from hybrid_jax.files import new_directory, write_text
from hybrid_jax.parameters import abstract_parameters
from kernels_pallas.recorded import recorded, without_out


def make_checkpoint(directory: pathlib.Path, model: str, layers: int | None) -> None:
    """Writes a checkpoint of random bfloat16 numbers in the shape of a public model, with this many layers."""
    config = config_from_hf({**PUBLIC[model], **({} if layers is None else {"num_hidden_layers": layers})})
    planned = planned_tensors(config, dict.fromkeys(abstract_parameters(config), jnp.bfloat16))
    rng = np.random.default_rng(0)
    block = (0.02 * rng.standard_normal(1 << 24)).astype(jnp.bfloat16)
    with new_directory(directory) as work:
        writer = WeightWriter(work, planned, MAX_SHARD_BYTES)
        for name, (_, shape) in planned.items():
            columns = int(np.prod(shape[1:], dtype=np.int64))
            rows = max(1, len(block) // columns // 2)
            for i in range(0, shape[0], rows):
                size = min(rows, shape[0] - i)
                start = int(rng.integers(len(block) - size * columns + 1))
                writer.write(name, block[start : start + size * columns].reshape(size, *shape[1:]), i)
        writer.check_complete()
        write_text(work / "config.json", json.dumps(config_to_hf(config, "bfloat16")))


def read(directory: str) -> None:
    """Reads every parameter into our layout and drops it."""
    for parameter in open_parameters(directory)[1].values():
        parameter[...]


def drop_pages(directory: pathlib.Path) -> None:
    """Writes a directory's files to the disk and drops their pages from memory."""
    for path in directory.glob("*.safetensors"):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(directory: pathlib.Path, model: str, layers: int | None) -> None:
    """Makes the checkpoint unless it is there, and prints the table."""
    source, out = directory / "source", directory / "out"
    if not source.exists():
        make_checkpoint(source, model, layers)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    config, parameters = open_parameters(source)
    largest = max(jnp.dtype(x.dtype).itemsize * np.prod(x.shape, dtype=np.int64) for x in parameters.values())
    pattern = "-".join(["*", "GKA"] * (config.num_layers // 2) + ["*"] * (config.num_layers % 2))
    cli = [sys.executable, "-m", "hybrid_jax", "convert", str(source), str(out)]
    steps = {
        "copy the files": [sys.executable, "-c", f"import shutil; shutil.copytree({str(source)!r}, {str(out)!r})"],
        "read into our layout": [sys.executable, "-c", f"from hybrid_jax.convert.bench import read; read({str(source)!r})"],
        "import and export": cli,
        "import, stage 0 (GKA in every second layer), export": [*cli, "--pattern", pattern],
    }
    print(f"{model}, {config.num_layers} layers, {size / 1e9:.2f} GB in bfloat16; the largest tensor has {largest / 1e9:.2f} GB")
    print(f"{'':52} {'seconds':>8} {'GB/s':>6} {'of copying':>10} {'peak memory':>12}")
    copying = 0.0
    for name, command in steps.items():
        shutil.rmtree(out, ignore_errors=True)
        drop_pages(source)
        os.sync()  # removing the last output is not counted
        begin = time.perf_counter()
        peak = peak_memory(command)
        drop_pages(out)  # writing is over when everything is on the disk
        seconds = time.perf_counter() - begin
        copying = copying or seconds
        print(f"{name:52} {seconds:8.1f} {size / seconds / 1e9:6.2f} {copying / seconds:10.0%} {peak / 1e9:9.2f} GB", flush=True)
    shutil.rmtree(out, ignore_errors=True)


def peak_memory(command: list[str]) -> int:
    """Runs a command and returns the largest resident memory of its process, in bytes.

    Raises:
      RuntimeError: it failed.
    """
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        errors.seek(0)
        if os.waitstatus_to_exitcode(status):
            raise RuntimeError(f"{' '.join(command[:5])} failed: {errors.read()[-500:]}")
    return usage.ru_maxrss * 1024


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m hybrid_jax.convert.bench", description=__doc__)
    parser.add_argument("directory", type=pathlib.Path, help="where the checkpoint is made, and kept")
    parser.add_argument("--model", default="Qwen/Qwen3-8B", choices=PUBLIC, metavar="NAME", help="a public model")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--out", metavar="FILE", help="also write what is printed to this file, with versions and machine")
    options = parser.parse_args()
    with recorded(options.out, "hybrid_jax.convert.bench", without_out(sys.argv[1:])):
        measure(options.directory, options.model, options.layers)


if __name__ == "__main__":
    main()
