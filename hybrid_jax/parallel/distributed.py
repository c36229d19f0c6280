"""Several processes: starting them from what the launcher's environment says, and what only the first one does."""

from __future__ import annotations

import os
import sys
import threading

import jax
import numpy as np
from jax.experimental import multihost_utils

# Launchers by the variable that says how many processes there are; JAX finds the coordinator from the rest.
LAUNCHERS = {"SLURM_NTASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}
OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TIMEOUT = "HYBRID_JAX_START_TIMEOUT"  # seconds to wait for every process


def initialize():
    """Joins the other processes of this job, if there are any; does nothing on a single machine.

    From `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` where all are set; else from Slurm or Open
    MPI, or the metadata of a TPU pod slice (GKE, TPU VMs).

    A process that waits in vain for the others ends the program with exit code 1 and says so.

    Raises:
      ValueError: only some of the three variables are set.
    """
    given = [name for name in OWN if os.environ.get(name)]
    if given and len(given) < len(OWN):
        missing = next(name for name in OWN if name not in given)
        raise ValueError(f"{given[0]} is set but {missing} is not; set all of {', '.join(OWN)}, or none")
    several = any(int(os.environ.get(name) or 1) > 1 for name in LAUNCHERS)
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or bool(os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"))
    if not (given or several or pod):
        return
    timeout = int(os.environ.get(TIMEOUT) or 300)
    options = {}
    if given:
        address, count, own = (os.environ[name] for name in OWN)
        options = dict(coordinator_address=address, num_processes=int(count), process_id=int(own))

    def give_up():  # the coordination service would end the process too, with a stack trace instead of a reason
        print(
            f"hybrid-jax: not all processes of the job came up within {timeout} s; look at the logs of the other hosts "
            f"(was every one started with the same command?), or set {TIMEOUT} to more seconds",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    watch = threading.Timer(timeout, give_up)
    watch.daemon = True
    watch.start()
    jax.distributed.initialize(initialization_timeout=timeout + 60, **options)
    watch.cancel()


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def barrier(name: str):
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def whole_array(x: jax.Array) -> np.ndarray:
    """An array's value on every host, wherever its parts lie; all processes must ask for it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(jax.device_get(x))
