"""Shared by the tests of jobs of several processes: how a process is started, and what it runs."""

import subprocess
import sys

from hybrid_jax.train import read_metrics
from tests.conftest import cpu_devices

CONFIG = r"""
from ml_collections import ConfigDict

def get_config():
    each = dict(steps=3, batch_size=4, seq_len=32, log_every=1, learning_rate=1e-2)
    align = dict(form="fused", objective="align_all", trainable=(r"\.gdn\.",), **each)
    train = dict(form="unfused", objective="next_token", **each)
    return ConfigDict(dict(source="SOURCE", pattern="*-GDN", mesh=MESH, schedule=("align", "train"), seed=3,
                           phases=dict(align=align, train=train),
                           data=dict(text="TEXT", sources=dict(more=dict(path="TEXT")), mix=dict(text=0.6, more=0.4))))
"""


def start(arguments, devices, env):
    env = {**cpu_devices(devices), **env}
    command = [sys.executable, "-m", "hybrid_jax", *arguments]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def member(port, count, process):
    return {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(process)}


def write_config(path, source, mesh):
    directory, text = source
    path.write_text(CONFIG.replace("SOURCE", str(directory)).replace("TEXT", str(text)).replace("MESH", mesh))
    return f"--config={path}"


def losses(workdir):
    return {(r["phase"], r["step"]): r["loss"] for r in read_metrics(workdir)}
