"""Two processes killed at random moments, again and again: the run ends with the weights of one that nothing disturbed."""

import os
import random
import re
import time

import numpy as np
import pytest

from hybrid_jax import load_model
from hybrid_jax.parameters import split_model
from tests.conftest import free_port
from tests.distributed.conftest import losses, member, start, write_config

KILLS = int(os.environ.get("HYBRID_JAX_TEST_KILLS", "20"))
STEPS = 150


@pytest.mark.long
def test_a_run_killed_many_times_ends_as_if_nothing_had_happened(made_source, tmp_path):
    argument = write_config(tmp_path / "config.py", made_source, "dict(data=2, fsdp=2)")
    path = tmp_path / "config.py"
    path.write_text(re.sub(r"steps=3", f"steps={STEPS}, checkpoint_every=2", path.read_text()))
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}

    def both(workdir):
        port = free_port()
        return [start(["prime", argument, f"--workdir={workdir}"], 2, {**cache, **member(port, 2, i)}) for i in range(2)]

    def finish(processes):
        outs = [p.communicate(timeout=900) for p in processes]
        assert [p.returncode for p in processes] == [0, 0], outs[0][1][-3000:] + outs[1][1][-3000:]

    def progress():
        return len(losses(tmp_path / "run"))

    finish(both(tmp_path / "whole"))
    rng, places = random.Random(0), []
    for n in range(KILLS):
        processes, before = both(tmp_path / "run"), progress()
        if n % 4:  # some time after it went on; every fourth time while it starts
            while progress() == before and None in [p.poll() for p in processes]:
                time.sleep(0.02)
        time.sleep(rng.uniform(0, 2.5 if n % 4 else 8))
        assert [p.poll() for p in processes] == [None, None], "the run ended before it was killed often enough"
        for p in processes:
            p.kill()
        for p in processes:
            p.communicate()
        places.append(progress())
    print(f"killed after {places} logged steps")
    finish(both(tmp_path / "run"))
    want, got = (split_model(load_model(tmp_path / d / "model"))[1] for d in ("whole", "run"))
    assert all(np.array_equal(got[n], want[n]) for n in want)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
