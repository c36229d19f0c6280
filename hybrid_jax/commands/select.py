"""`select SRC`: rank the layers by what replacing each costs."""

from __future__ import annotations

import argparse

from hybrid_jax.commands.options import directory, integer, number


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("source", type=directory, help="a Hugging Face directory with its tokenizer")
    parser.add_argument("--mixer", default="GKA", help="symbol of the mixer in the printed pattern")
    parser.add_argument("--fraction", type=number(above=0, maximum=1), default=0.5, help="of the layers to convert")
    parser.add_argument("--window", type=integer(minimum=1), default=16, help="of the sliding-window attention used to score")
    parser.add_argument("--rows", type=integer(minimum=1), default=16, help="held-out rows of text and of retrieval")
    parser.add_argument("--seq-len", type=integer(minimum=1), default=256, help="tokens a row")
    parser.add_argument("--text", default="stdlib", help="'stdlib', a .jsonl file, a text file or a folder")


def run(args: argparse.Namespace):
    import jax.numpy as jnp

    from hybrid_jax.convert import check_model_directory, load_model
    from hybrid_jax.data import check_tokenizer_fits, load_tokenizer, read_corpus
    from hybrid_jax.priming.select import Selection, pattern_from_scores, score_layers

    selection = Selection(args.mixer, args.fraction, args.window, args.rows, args.seq_len)
    config = check_model_directory(args.source)
    check_tokenizer_fits(load_tokenizer(args.source), config.vocab_size, args.source)
    if args.seq_len > config.max_position_embeddings:
        raise ValueError(
            f"--seq-len {args.seq_len:,} is more than the model's max_position_embeddings, {config.max_position_embeddings:,}"
        )
    model = load_model(args.source, dtype=jnp.float32)
    corpus = read_corpus({"text": args.text}, args.source, model.config.extra.get("eos_token_id"))
    print(pattern_from_scores(score_layers(model, corpus, selection), args.mixer, args.fraction))
