"""Small released recurrent models in torch: Llamba, Phi-Mamba, Hybrid Phi-Mamba and Mamba-3, with the released names of tensors.

They are written from the papers and from the released programs' names and formulas. Discrete Mamba-2 is computed by its mixing
matrix, Mamba-3 token by token.
"""

import math

import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

LLAMBA = {
    "model_type": "llamba",
    "vocab_size": 93,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": False,
    "lm_head_bias": False,
    "d_model": 32,
    "lm_head_prenorm": "rms",
    "n_layer": 2,
    "resid_dropout": 0.0,
    "norm_epsilon": 1e-5,
    "eos_token_id": 7,
    "mlp_cfg": {"intermediate_size": 40, "bias": False, "act_fn": "silu"},
    "ssm_cfg": {
        "d_state": 6,
        "n_v_heads": 4,
        "n_qk_heads": 2,
        "expand": 1,
        "chunk_size": 128,
        "activation": "identity",
        "bias": False,
    },
}
BIASED = {**LLAMBA["ssm_cfg"], "expand": 2, "bias": True, "conv_bias": False, "d_conv": 3, "activation": "silu", "n_qk_heads": 4}


def block(count, core, options):
    return {
        "n_layers": count,
        "BlockType": "modules.phi_block",
        "block_input": {"resid_dropout": 0.0},
        "CoreType": f"modules.mixers.{core}",
        "core_input": options,
    }


CORE = {
    "d_state": 8,
    "n_v_heads": 4,
    "n_qk_heads": 4,
    "d_conv": 4,
    "conv_bias": True,
    "expand": 1,
    "chunk_size": 128,
    "activation": "identity",
    "bias": False,
}
PHI_ATTENTION = {"hidden_size": 32, "num_attention_heads": 4, "rope_theta": 100.0, "attn_type": "eager"}
PHI_MAMBA = {
    "LanguageModel": {"input": {"vocab_size": 96, "pad_vocab_size_multiple": 8}},
    "MixerModel": {"input": {"d_model": 32, "n_layer": 2, "lm_head_prenorm": "layer"}},
    "Block1": block(2, "discrete_mamba2", CORE),
}
HYBRID = {
    **PHI_MAMBA,
    "MixerModel": {"input": {"d_model": 32, "n_layer": 4, "lm_head_prenorm": "layer"}},
    "Block2": block(1, "phi_attention", PHI_ATTENTION),
    "Block3": block(1, "discrete_mamba2", CORE),
}
MAMBA3 = {
    "d_model": 16,
    "d_intermediate": 100,
    "n_layer": 2,
    "vocab_size": 93,
    "ssm_cfg": {"layer": "Mamba3", "d_state": 16, "headdim": 8},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 8,
    "tie_embeddings": True,
}
MIMO = {
    **MAMBA3["ssm_cfg"],
    "expand": 3,
    "is_mimo": True,
    "mimo_rank": 2,
    "ngroups": 2,
    "is_outproj_norm": True,
    "rope_fraction": 1.0,
    "A_floor": 1.2,
    "chunk_size": 16,
}
WITHOUT_MLPS = {key: value for key, value in MAMBA3.items() if key != "d_intermediate"}  # which is 0 then
CASES = {
    "llamba": LLAMBA,
    "llamba, tied, biased": {
        **LLAMBA,
        "tie_embeddings": True,
        "mlp_cfg": {**LLAMBA["mlp_cfg"], "bias": True},
        "ssm_cfg": BIASED,
    },
    "phi-mamba": PHI_MAMBA,
    "hybrid phi-mamba": HYBRID,
    "mamba3": MAMBA3,
    "mamba3 mimo, layer norms, untied": {**MAMBA3, "rms_norm": False, "tie_embeddings": False, "ssm_cfg": MIMO},
    "mamba3 without MLPs": WITHOUT_MLPS,
}


class RMSNorm(torch.nn.Module):
    def __init__(self, dim, group=None):
        super().__init__()
        self.weight, self.group = torch.nn.Parameter(torch.ones(dim)), group or dim

    def forward(self, x):
        y = x.unflatten(-1, (-1, self.group))
        return (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * self.weight


class DiscreteMamba2(torch.nn.Module):
    def __init__(self, d_model, ssm):
        super().__init__()
        ssm = {"d_conv": 4, "conv_bias": True, **ssm}
        self.ssm, self.inner, self.keys = ssm, ssm["expand"] * d_model, ssm["n_qk_heads"] * ssm["d_state"]
        inner, width, bias = self.inner, self.inner + 2 * self.keys, ssm["bias"]
        self.in_proj = torch.nn.Linear(d_model, width + inner + ssm["n_v_heads"], bias=bias)
        if not bias:
            self.z_bias = torch.nn.Parameter(torch.zeros(inner))
        taps = ssm["d_conv"]
        self.conv1d = torch.nn.Conv1d(width, width, taps, groups=width, padding=taps - 1, bias=ssm["conv_bias"])
        self.D = torch.nn.Parameter(torch.ones(ssm["n_v_heads"]))
        self.out_proj = torch.nn.Linear(inner, d_model, bias=bias)

    def forward(self, u):
        T, H = u.shape[1], self.ssm["n_v_heads"]
        xbc, z, a = self.in_proj(u).split([self.inner + 2 * self.keys, self.inner, H], dim=-1)
        xbc = self.conv1d(xbc.mT)[..., :T].mT
        xbc = F.silu(xbc) if self.ssm["activation"] == "silu" else xbc
        x, b, c = xbc.split([self.inner, self.keys, self.keys], dim=-1)
        x, b, c = (y.unflatten(-1, (n, -1)) for y, n in ((x, H), (b, self.ssm["n_qk_heads"]), (c, self.ssm["n_qk_heads"])))
        b, c = (y.repeat_interleave(H // y.shape[2], dim=2) for y in (b, c))
        total = -F.softplus(a).cumsum(1)
        causal = torch.ones(T, T, dtype=torch.bool).tril()[:, :, None]
        decay = torch.where(causal, torch.exp(total[:, :, None] - total[:, None]), 0)
        matrix = torch.einsum("bthn,bshn->btsh", c, b) * decay + torch.eye(T, dtype=u.dtype)[None, :, :, None] * self.D
        y = torch.einsum("btsh,bshp->bthp", matrix, x).flatten(2)
        return self.out_proj(y * F.silu(z if self.ssm["bias"] else z + self.z_bias))


class PhiAttention(torch.nn.Module):
    def __init__(self, d_model, options):
        super().__init__()
        self.heads, self.theta = options["num_attention_heads"], options["rope_theta"]
        self.q_proj, self.k_proj, self.v_proj, self.dense = (torch.nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        o = F.scaled_dot_product_attention(self._rotated(q), self._rotated(k), v, is_causal=True)
        return self.dense(o.transpose(1, 2).flatten(2))

    def _rotated(self, x):
        """Half of the channels are rotated, each with the one a quarter of the head further on."""
        n = x.shape[-1] // 4
        angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * self.theta ** -(torch.arange(n, dtype=x.dtype) / n)
        a, b, rest = x.split([n, n, 2 * n], dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], dim=-1)


class Mamba3(torch.nn.Module):
    def __init__(self, d_model, ssm):
        super().__init__()
        ssm = {"expand": 2, "ngroups": 1, "rope_fraction": 0.5, "A_floor": 1e-4, "is_mimo": False, "is_outproj_norm": False, **ssm}
        self.ssm, self.R = ssm, ssm["mimo_rank"] if ssm["is_mimo"] else 1
        self.P, self.N, self.G = ssm["headdim"], ssm["d_state"], ssm["ngroups"]
        self.inner = ssm["expand"] * d_model
        self.H, self.angles = self.inner // self.P, int(self.N * ssm["rope_fraction"]) // 2
        width = 2 * self.inner + 2 * self.R * self.G * self.N + 3 * self.H + self.angles
        self.in_proj = torch.nn.Linear(d_model, width, bias=False)
        self.dt_bias = torch.nn.Parameter(torch.zeros(self.H))
        self.B_bias, self.C_bias = (torch.nn.Parameter(torch.ones(self.H, self.R, self.N)) for _ in "BC")
        self.B_norm, self.C_norm = RMSNorm(self.N), RMSNorm(self.N)
        if ssm["is_mimo"]:
            self.mimo_x, self.mimo_z, self.mimo_o = (torch.nn.Parameter(torch.ones(self.H, self.R, self.P)) for _ in "xzo")
        self.D = torch.nn.Parameter(torch.ones(self.H))
        if ssm["is_outproj_norm"]:
            self.norm = RMSNorm(self.inner, self.P)
        self.out_proj = torch.nn.Linear(self.inner, d_model, bias=False)

    def forward(self, u):
        H, R, P, N, G = self.H, self.R, self.P, self.N, self.G
        z, x, b, c, dt, a, trap, angle = self.in_proj(u).split(
            [self.inner, self.inner, R * G * N, R * G * N, H, H, H, self.angles], dim=-1
        )
        dt, trap = F.softplus(dt + self.dt_bias), trap.sigmoid()
        decay = torch.exp(-torch.where(a >= 0, 1 + a, 1 / (1 - a.clamp(max=0))).clamp(min=self.ssm["A_floor"]) * dt)
        turned = (math.pi * angle.tanh()[:, :, None] * dt[..., None]).cumsum(1)  # [batch, T, H, angles]
        b, c = (
            self._rotated(norm(y.unflatten(-1, (R, G, N))).repeat_interleave(H // G, dim=3).transpose(2, 3) + bias, turned)
            for y, norm, bias in ((b, self.B_norm, self.B_bias), (c, self.C_norm, self.C_bias))
        )  # [batch, T, H, R, N]
        x, z = (y.unflatten(-1, (H, 1, P)) for y in (x, z))
        x, z = (x * self.mimo_x, z * self.mimo_z) if self.ssm["is_mimo"] else (x, z)
        state, before, outs = torch.zeros(len(u), H, N, P, dtype=u.dtype), 0, []
        for t in range(u.shape[1]):
            added = torch.einsum("bhrn,bhrp->bhnp", b[:, t], x[:, t])
            step, share = dt[:, t, :, None, None], trap[:, t, :, None, None]
            state = decay[:, t, :, None, None] * (state + (1 - share) * step * before) + share * step * added
            before = added
            outs.append(torch.einsum("bhrn,bhnp->bhrp", c[:, t], state) + self.D[:, None, None] * x[:, t])
        y = torch.stack(outs, dim=1)
        if self.ssm["is_outproj_norm"]:
            y = self.norm(y.transpose(2, 3).flatten(3)).unflatten(-1, (H, P)).transpose(2, 3)
        y = y * F.silu(z)
        return self.out_proj(((y * self.mimo_o) if self.ssm["is_mimo"] else y).sum(3).flatten(2))

    def _rotated(self, x, turned):
        """SISO rotates channels 2j and 2j + 1 together, MIMO j and j + N / 2."""
        cos, sin, A, y = turned.cos()[..., None, :], turned.sin()[..., None, :], self.angles, x.clone()
        first, second = (
            (slice(0, A), slice(self.N // 2, self.N // 2 + A))
            if self.ssm["is_mimo"]
            else (
                slice(0, 2 * A, 2),
                slice(1, 2 * A, 2),
            )
        )
        y[..., first] = x[..., first] * cos - x[..., second] * sin
        y[..., second] = x[..., first] * sin + x[..., second] * cos
        return y


class GatedMLP(torch.nn.Module):
    """Llama's, or Mamba-3's, whose inputs are one map."""

    def __init__(self, d_model, width, bias, fused):
        super().__init__()
        if fused:
            self.fc1, self.fc2 = torch.nn.Linear(d_model, 2 * width, bias=bias), torch.nn.Linear(width, d_model, bias=bias)
        else:
            self.gate_proj, self.up_proj = (torch.nn.Linear(d_model, width, bias=bias) for _ in range(2))
            self.down_proj = torch.nn.Linear(width, d_model, bias=bias)
        self.fused = fused

    def forward(self, x):
        if not self.fused:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        up, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(up * F.silu(gate))


class LlambaBlock(torch.nn.Module):
    def __init__(self, hf):
        super().__init__()
        d, mlp = hf["d_model"], hf["mlp_cfg"]
        self.mixer, self.mlp = DiscreteMamba2(d, hf["ssm_cfg"]), GatedMLP(d, mlp["intermediate_size"], mlp["bias"], False)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(d), RMSNorm(d)

    def forward(self, x):
        x = x + self.mixer(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class PhiBlock(torch.nn.Module):
    def __init__(self, d_model, block):
        super().__init__()
        attends = block["CoreType"].endswith("phi_attention")
        self.mixer = Wrapped(PhiAttention, d_model, block) if attends else DiscreteMamba2(d_model, block["core_input"])
        self.mlp = torch.nn.ModuleDict({"fc1": torch.nn.Linear(d_model, 4 * d_model), "fc2": torch.nn.Linear(4 * d_model, d_model)})
        self.input_layernorm = torch.nn.LayerNorm(d_model)

    def forward(self, x):
        n = self.input_layernorm(x)
        return x + self.mixer(n) + self.mlp["fc2"](F.gelu(self.mlp["fc1"](n), approximate="tanh"))


class Wrapped(torch.nn.Module):
    def __init__(self, mixer, d_model, block):
        super().__init__()
        self.self_attn = mixer(d_model, block["core_input"])

    def forward(self, x):
        return self.self_attn(x)


class Mamba3Block(torch.nn.Module):
    def __init__(self, hf, norm):
        super().__init__()
        d = hf["d_model"]
        width = hf.get("d_intermediate", 0)
        self.norm, self.mixer = norm(d), Mamba3(d, hf["ssm_cfg"])
        self.norm2, self.mlp = (norm(d), GatedMLP(d, -(-width // 128) * 128, False, True)) if width else (None, None)

    def forward(self, x):
        x = x + self.mixer(self.norm(x))
        return x if self.mlp is None else x + self.mlp(self.norm2(x))


class Model(torch.nn.Module):
    """The released model of a config.json, with random parameters, in float32."""

    def __init__(self, hf):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Module()
        if "LanguageModel" in hf:
            inputs = hf["LanguageModel"]["input"]
            d, vocab, tied, bias = hf["MixerModel"]["input"]["d_model"], inputs, False, True
            norm, last = torch.nn.LayerNorm, "final_layernorm"
            layers = [PhiBlock(d, hf[key]) for key in hf if key.startswith("Block") for _ in range(hf[key]["n_layers"])]
        else:
            d, vocab, tied, bias = hf["d_model"], hf, hf["tie_embeddings"], hf.get("lm_head_bias", False)
            llamba = "mlp_cfg" in hf
            norm = RMSNorm if llamba or hf["rms_norm"] else torch.nn.LayerNorm
            layers = [LlambaBlock(hf) if llamba else Mamba3Block(hf, norm) for _ in range(hf["n_layer"])]
            last = "final_layernorm" if llamba else "norm_f"
        rows = -(-vocab["vocab_size"] // vocab["pad_vocab_size_multiple"]) * vocab["pad_vocab_size_multiple"]
        self.backbone.embedding, self.backbone.layers = torch.nn.Embedding(rows, d), torch.nn.ModuleList(layers)
        self.backbone.add_module(last, norm(d))
        self.last, self.head = last, None if tied else torch.nn.Linear(d, rows, bias=bias)
        if self.head is not None:
            self.lm_head = self.head
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                near_one = name.endswith(("norm.weight", "norm2.weight", "norm_f.weight", "D")) or "_bias" in name or "mimo" in name
                parameter.copy_(torch.randn_like(parameter) * 0.3 + near_one)

    def forward(self, ids):
        x = self.backbone.embedding(ids)
        for layer in self.backbone.layers:
            x = layer(x)
        x = getattr(self.backbone, self.last)(x)
        return x @ self.backbone.embedding.weight.T if self.head is None else self.head(x)
