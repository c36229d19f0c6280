"""`generate MODEL PROMPT`."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import TYPE_CHECKING

from hybrid_jax.commands.options import directory, integer, number

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from hybrid_jax.composition import Composition
    from hybrid_jax.config import ModelConfig
    from hybrid_jax.generation import GenerationDefaults, Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=directory, help="a model directory with its tokenizer, e.g. RUN/model")
    parser.add_argument("prompt", help="the text to continue; '-' reads it from stdin")
    parser.add_argument("--file", action="store_true", help="PROMPT is the name of a file that holds the text")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message: use the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    parser.add_argument("--max-new-tokens", type=integer(minimum=1), default=64, help="at most so many tokens")
    said = "default: as the model's generation_config.json says, else"
    parser.add_argument("--temperature", type=number(minimum=0), help=f"0 is greedy ({said} 0)")
    parser.add_argument(
        "--top-p", type=number(above=0, maximum=1), help=f"keep the top tokens up to this probability ({said} 1, all)"
    )
    parser.add_argument("--top-k", type=integer(minimum=0), help=f"keep this many of the most likely tokens ({said} 0, all)")
    parser.add_argument("--seed", type=integer(minimum=0, maximum=2**32 - 1), default=0, help="of sampling")
    composing = parser.add_argument_group(
        "long contexts", "read PROMPT in chunks and compose what they leave (hybrid_jax/composition)"
    )
    composing.add_argument("--compose", metavar="KEYS:STATES", help="how, e.g. concat:soup; needs --question")
    composing.add_argument("--question", metavar="TEXT", help="with --compose: follows PROMPT, and is read once")
    composing.add_argument("--prefix", metavar="TEXT", help="with --compose: stands before every chunk")
    composing.add_argument(
        "--chunk", type=integer(minimum=1), metavar="TOKENS", help="with --compose: of a chunk at most (else 4096)"
    )


def _prompt(args: argparse.Namespace) -> str:
    """Returns the prompt's text; that of a file or of stdin without its last line break.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the text is not UTF-8.
    """
    if not args.file and args.prompt != "-":
        return args.prompt
    data = pathlib.Path(args.prompt).read_bytes() if args.file else sys.stdin.buffer.read()
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as e:
        raise ValueError(f"the prompt in {args.prompt if args.file else 'stdin'} is not UTF-8 text ({e})") from None


def _sampling(args: argparse.Namespace, defaults: Sampling) -> Sampling:
    """Returns the model's own sampling, with the options of the command line in place of its values.

    Raises:
      ValueError: an option has no effect, because generation is greedy.
    """
    import dataclasses

    given = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k") if getattr(args, name) is not None}
    sampling = dataclasses.replace(defaults, **given)
    if sampling.greedy and given.keys() & {"top_p", "top_k"}:
        raise ValueError("--top-p and --top-k have no effect on greedy generation; give --temperature above 0 too")
    return sampling


def _composition(args: argparse.Namespace) -> Composition | None:
    """Returns how PROMPT is read in chunks; None: not at all.

    Raises:
      ValueError: a bad composition, or options that do not go together.
    """
    from hybrid_jax.composition import Composition

    if args.compose is None:
        if given := [name for name in ("question", "prefix", "chunk") if getattr(args, name) is not None]:
            raise ValueError(f"--{given[0]} needs --compose")
        return None
    if args.chat:
        raise ValueError("--compose reads plain text; leave --chat out")
    if not args.question:
        raise ValueError("--compose needs --question, the text that follows PROMPT")
    return Composition.parse(args.compose, args.chunk or Composition().chunk)


def _composed_parts(
    args: argparse.Namespace, composition: Composition, config: ModelConfig, tokenizer: Tokenizer, prompt: str
) -> list[list[int]]:
    """Returns the ids of prefix, PROMPT and question; the first of them that is not empty begins as a document does.

    Raises:
      ValueError: one has no tokens, or the model cannot read them so.
    """
    from hybrid_jax.data.tokenizer import encode_prompt

    def encoded(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    prefix = encode_prompt(tokenizer, args.prefix) if args.prefix else []
    parts = [prefix, encoded(prompt) if prefix else encode_prompt(tokenizer, prompt), encoded(args.question)]
    if not parts[1] or not parts[2]:
        raise ValueError("--compose needs a PROMPT and a --question of at least one token each")
    composition.check(config)
    composition.check_positions(config, len(parts[0]), len(parts[1]), len(parts[2]) + args.max_new_tokens)
    return parts


def _notice_if_sampled(sampling: Sampling, defaults: GenerationDefaults) -> None:
    """Says that the model's own settings sample, where nothing on the command line does."""
    from hybrid_jax.parallel.distributed import notice

    if sampling == defaults.sampling and not sampling.greedy:
        notice(f"sampling as the model's generation_config.json says: {sampling}")


def run(args: argparse.Namespace) -> None:
    import dataclasses

    import jax.numpy as jnp

    from hybrid_jax.composition import generate_composed
    from hybrid_jax.convert import check_model_directory, load_model
    from hybrid_jax.data import check_tokenizer_fits, load_tokenizer
    from hybrid_jax.data.chat import ChatTemplate
    from hybrid_jax.data.tokenizer import END_OF_TEXT, decode_continuation, encode_prompt
    from hybrid_jax.generation import check_prompts, generate, generation_defaults

    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat")
    composition = _composition(args)
    config = check_model_directory(args.model)
    tokenizer = check_tokenizer_fits(load_tokenizer(args.model), config.vocab_size, args.model)
    defaults = generation_defaults(args.model, config)
    sampling = _sampling(args, defaults.sampling)
    prompt = _prompt(args)
    ends = defaults.eos_ids
    if ends is None:  # nothing says: a tokenizer of ours does
        ends = [i for i in [tokenizer.token_to_id(END_OF_TEXT)] if i is not None]
    options = dict(max_new_tokens=args.max_new_tokens, eos_id=ends, seed=args.seed, **dataclasses.asdict(sampling))
    if composition is not None:
        prefix, context, question = _composed_parts(args, composition, config, tokenizer, prompt)
        _notice_if_sampled(sampling, defaults)
        model = load_model(args.model, dtype=jnp.float32)
        new = generate_composed(model, context, question, composition=composition, prefix=prefix, **options)
        print(f"{args.prefix or ''}{prompt}{args.question}" + decode_continuation(tokenizer, [*prefix, *context, *question], new))
        return
    if args.chat:
        messages = [{"role": "system", "content": args.system}] if args.system is not None else []
        messages.append({"role": "user", "content": prompt})
        text = ChatTemplate(args.model).render(messages, add_generation_prompt=True)
    else:
        text = prompt
    # Chat templates write the tokens that begin a document themselves.
    ids = tokenizer.encode(text, add_special_tokens=False).ids if args.chat else encode_prompt(tokenizer, text)
    check_prompts(config, [ids], args.max_new_tokens)
    _notice_if_sampled(sampling, defaults)
    model = load_model(args.model, dtype=jnp.float32)
    (new,) = generate(model, [ids], **options)
    print(tokenizer.decode(new) if args.chat else prompt + decode_continuation(tokenizer, ids, new))
