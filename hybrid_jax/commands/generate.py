"""`generate MODEL PROMPT`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("model", help="a model directory with its tokenizer")
    parser.add_argument("prompt", help="the text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace):
    import jax.numpy as jnp

    from hybrid_jax.convert import load_model
    from hybrid_jax.data import load_tokenizer
    from hybrid_jax.data.tokenizer import end_of_text_id
    from hybrid_jax.generate import generate

    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, dtype=jnp.float32)
    eos = end_of_text_id(tokenizer, model.config.extra.get("eos_token_id"))
    ids = tokenizer.encode(args.prompt, add_special_tokens=False).ids
    (new,) = generate(
        model,
        [ids],
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        eos_id=eos,
        seed=args.seed,
    )
    print(args.prompt + tokenizer.decode(new))
