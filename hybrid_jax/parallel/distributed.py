"""Several processes: starting them from what the launcher's environment says, what only the first one does, ending together."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src.distributed import global_state  # the coordination service's key-value store has no public name
from jax.experimental import multihost_utils

from hybrid_jax.checks import check_integer

# Launchers by the variable that says how many processes there are; JAX finds the coordinator from the rest.
LAUNCHERS = {"SLURM_NTASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI"}
OWN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TIMEOUT = "HYBRID_JAX_START_TIMEOUT"  # seconds to wait for every process

# Keys of a job that ends early: why, and the processes that have left.
_ENDED, _REASON, _LEFT = "hybrid_jax/ended/", "hybrid_jax/ended/reason", "hybrid_jax/left/"
_POLL_SECONDS, _LEAVE_SECONDS = 1.0, 20.0
_leaving = threading.Lock()  # taken once, by whatever ends the process


def initialize() -> None:
    """Joins the other processes of this job, if there are any; does nothing on a single machine.

    From `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` where all are set; else from Slurm or Open
    MPI, or the metadata of a TPU pod slice (GKE, TPU VMs).

    A process that waits in vain for the others ends the program with exit code 1 and says so. From then on a process that
    calls `end_job` ends all others too, whatever they wait for.

    Raises:
      ValueError: only some of the three variables are set, or a number in the environment is none.
    """
    given = [name for name in OWN if os.environ.get(name)]
    if given and len(given) < len(OWN):
        missing = next(name for name in OWN if name not in given)
        raise ValueError(f"{given[0]} is set but {missing} is not; set all of {', '.join(OWN)}, or none")
    several = any(_from_environment(name, 1) > 1 for name in LAUNCHERS)
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or bool(os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"))
    if not (given or several or pod):
        return
    timeout = _from_environment(TIMEOUT, 300, minimum=1)
    options: dict[str, Any] = {}
    if given:
        count = _from_environment("JAX_NUM_PROCESSES", 1, minimum=1)
        own = _from_environment("JAX_PROCESS_ID", 0, minimum=0, maximum=count - 1)
        options = dict(coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"], num_processes=count, process_id=own)

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
    if global_state.num_processes > 1:
        threading.Thread(target=_end_with_the_others, args=(global_state.client,), daemon=True).start()


def _from_environment(name: str, default: int, **bounds: int) -> int:
    """An integer of the environment."""
    text = os.environ.get(name) or str(default)
    return check_integer(name, int(text) if text.isdigit() else text, **bounds)


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return jax.process_index() == 0


def say(message: str) -> None:
    """Prints a message for the user: on the first process alone, so that a job of many hosts says it once."""
    if is_first():
        print(message, flush=True)


def notice(message: str) -> None:
    """Tells the user, on stderr, that something was not taken as it is; of several processes the first does."""
    if is_first():
        print(f"hybrid-jax: {message}", file=sys.stderr, flush=True)


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def of_every_process(value: int) -> list[int]:
    """An integer of each process, by the processes' numbers; all of them must ask for it."""
    if jax.process_count() == 1:
        return [int(value)]
    return np.ravel(multihost_utils.process_allgather(np.int32(value))).tolist()


def _client() -> Any:
    """Returns the coordination service's key-value store; JAX has no public name for it.

    Raises:
      RuntimeError: this process is in no job.
    """
    if global_state.client is None:
        raise RuntimeError("this process is not in a job of several processes")
    return global_state.client


def in_job() -> bool:
    """Whether `initialize` found other processes; known without asking for devices."""
    return global_state.client is not None and global_state.num_processes > 1


def end_job(message: str, code: int) -> NoReturn:
    """Ends every process of the job with a message on stderr and an exit code.

    For a failure of one process alone: the others wait for it at a barrier or in a collective operation, and would wait for ever.
    """
    with _leaving:  # never given back
        with contextlib.suppress(Exception):  # another process was first
            _client().key_value_set(_REASON, json.dumps([global_state.process_id, message, code]))
        _leave(message, code)


def _end_with_the_others(client):
    """Waits for the first process that ends the job, and then ends this one. Runs in a thread."""
    found = []
    while not found:
        time.sleep(_POLL_SECONDS)
        with contextlib.suppress(Exception):  # no longer served: this process is at its end
            found = client.key_value_dir_get(_ENDED)
    process, message, code = json.loads(found[0][1])
    time.sleep(_POLL_SECONDS)  # the same failure may be on its way here, with a message of its own
    with _leaving:
        _leave(f"{message} (on process {process}, which ended the job)", code)


def _leave(message: str, code: int) -> NoReturn:
    """Exits without Python's clean-up, which would wait for the other processes. The one with the coordinator goes last."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    until = time.monotonic() + _LEAVE_SECONDS
    with contextlib.suppress(Exception):
        client = _client()
        client.key_value_set(f"{_LEFT}{global_state.process_id}", "")
        while global_state.process_id == 0 and time.monotonic() < until:
            if len(client.key_value_dir_get(_LEFT)) == global_state.num_processes:
                break
            time.sleep(0.1)
    os._exit(code)


def whole_array(x: jax.Array) -> np.ndarray:
    """Returns an array's value on every host, however it is sharded; all processes must call this."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(jax.device_get(x))
