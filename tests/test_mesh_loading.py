"""Loading straight into a sharding, on eight CPU devices in a process of its own."""

import subprocess
import sys

from hybrid_jax import save_model
from tests.conftest import cpu_devices, tiny_model

PROGRAM = """
import sys
import jax
import numpy as np
from hybrid_jax import load_model
from hybrid_jax.convert.load import StoredParameter
from hybrid_jax.parameters import split_model
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
read, original = [], StoredParameter.__getitem__
StoredParameter.__getitem__ = lambda self, index: read.append(original(self, index)) or read[-1]
sharded = load_model(sys.argv[1], mesh=mesh)
StoredParameter.__getitem__ = original
parameters = split_model(sharded)[1]
assert sum(x.size for x in read) == sum(x.size for x in parameters.values())  # replicas are read once
assert max(x.size for x in read) == 62 * 24 // 8  # a device's part of the embedding
whole = load_model(sys.argv[1])
kernel = sharded.layers[1].gka.q_proj.kernel[...]
assert kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp", "tensor"), kernel.sharding
assert kernel.addressable_shards[0].data.shape == (6, 16)
ids = np.arange(12)[None]
assert np.allclose(sharded(ids), whole(ids), atol=1e-4)
try:
    load_model(sys.argv[1], mesh=jax.make_mesh((5,), ("fsdp",), devices=jax.devices()[:5]))
except ValueError as e:
    assert "'fsdp' of size 5 does not divide 'embed'" in str(e), e
else:
    raise AssertionError("a mesh that does not divide was accepted")
print("passed")
"""


def test_parameters_are_read_straight_into_their_sharding(tmp_path):
    save_model(tiny_model("*-GKA", vocab_size=62), tmp_path / "model")
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "model")]
    done = subprocess.run(command, env=cpu_devices(8), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "passed" in done.stdout, done.stderr[-2000:]
