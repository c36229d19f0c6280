"""The chunked form: matmuls inside a chunk, a scan of states across chunks.

O = scale [(Q e^a) H0 + ((Q K') M) V],     H1 = e^{a_C} H0 + (K e^{a_C - a})' V
"""

from __future__ import annotations

from kernels_pallas.chunks import CHUNK, chunk_decay, chunk_outputs, chunk_states, from_chunks, to_chunks


def linear_attention_chunked(q, k, v, log_decay, state, segments, scale, chunk_size):
    T, chunk_size = q.shape[1], chunk_size or CHUNK
    decay = chunk_decay(log_decay, segments, chunk_size, state.dtype)
    qc, kc, vc = (to_chunks(x, chunk_size) for x in (q, k, v))
    before, final = chunk_states(kc, vc, decay, state)
    o = scale * chunk_outputs(qc, kc, vc, decay, before)
    return from_chunks(o, T).astype(v.dtype), final
