"""`generate MODEL PROMPT`, also read in chunks; `generate MODEL --prompts FILE --out FILE`, which the same command continues."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hybrid_jax.commands.options import add_gka_iterations, directory, integer, number

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from hybrid_jax.composition import Composition
    from hybrid_jax.config import ModelConfig
    from hybrid_jax.data.prompts import Prompt
    from hybrid_jax.generation import Sampling
    from hybrid_jax.model import Decoder

OF_FILES = {"out": None, "batch_size": 8, "samples": 1}  # the options that only --prompts has, and their defaults


class _InPlaceOf(argparse.Action):
    """Stores an option's value, and then does not require the argument `positional`.

    An argument that is optional (`nargs="?"`) would be taken as absent wherever an option stands before it.
    """

    def __init__(self, *args: Any, positional: argparse.Action, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.positional = positional

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, values)
        self.positional.required = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=directory, help="a model directory with its tokenizer, e.g. RUN/model")
    prompt = parser.add_argument("prompt", help="the text to continue; '-' reads it from stdin; with --prompts there is none")
    parser.add_argument("--file", action="store_true", help="PROMPT is the name of a file that holds the text")
    parser.add_argument(
        "--prompts",
        action=_InPlaceOf,
        positional=prompt,
        metavar="FILE",
        help="answer a file instead, of JSON lines with 'prompt' (a text) or 'messages' (a conversation), and maybe 'id'",
    )
    parser.add_argument("--out", metavar="FILE", help="with --prompts: the answers, as JSON lines that `prepare` reads")
    parser.add_argument(
        "--batch-size", type=integer(minimum=1), default=OF_FILES["batch_size"], help="with --prompts: answers made at a time"
    )
    parser.add_argument(
        "--samples", type=integer(minimum=1), default=OF_FILES["samples"], help="with --prompts: answers to each prompt"
    )
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
    add_gka_iterations(parser)
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
      ValueError: an option has no effect, because generation is greedy, or makes the same answer several times.
    """
    import dataclasses

    given = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k") if getattr(args, name) is not None}
    sampling = dataclasses.replace(defaults, **given)
    if sampling.greedy and given.keys() & {"top_p", "top_k"}:
        raise ValueError("--top-p and --top-k have no effect on greedy generation; give --temperature above 0 too")
    if sampling.greedy and args.samples > 1:
        raise ValueError(f"greedy generation makes --samples {args.samples} equal answers; give --temperature above 0 too")
    return sampling


def _check_prompt(args: argparse.Namespace) -> None:
    """Checks that there is one prompt or a file of prompts, and no option of the other.

    Raises:
      ValueError: there are both, or such an option.
    """
    if args.prompt is not None and args.prompts is not None:
        raise ValueError("give either a prompt or --prompts FILE")
    if args.prompts is None and (given := [name for name, default in OF_FILES.items() if getattr(args, name) != default]):
        raise ValueError(f"--{given[0].replace('_', '-')} needs --prompts FILE")
    if args.prompts is not None and args.file:
        raise ValueError("--file is of a single prompt; --prompts names a file already")
    if args.prompts is not None and args.out is None:
        raise ValueError("--prompts needs --out FILE for the answers")
    if args.system is not None and not args.chat:
        raise ValueError("--system needs --chat")


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
    if args.prompts is not None:
        raise ValueError("--compose reads one prompt in chunks; it cannot stand beside --prompts")
    if args.chat:
        raise ValueError("--compose reads plain text; leave --chat out")
    if not args.question:
        raise ValueError("--compose needs --question, the text that follows PROMPT")
    return Composition.parse(args.compose, args.chunk or Composition().chunk)


def run(args: argparse.Namespace) -> None:
    import functools

    from hybrid_jax.convert import check_model_directory
    from hybrid_jax.data import check_tokenizer_fits, load_tokenizer
    from hybrid_jax.data.tokenizer import END_OF_TEXT
    from hybrid_jax.generation import generation_defaults
    from hybrid_jax.parallel.distributed import notice

    _check_prompt(args)
    composition = _composition(args)
    config = check_model_directory(args.model).with_iterations(args.gka_iterations)
    tokenizer = check_tokenizer_fits(load_tokenizer(args.model), config.vocab_size, args.model)
    defaults = generation_defaults(args.model, config)
    sampling = _sampling(args, defaults.sampling)
    if sampling == defaults.sampling and not sampling.greedy:
        notice(f"sampling as the model's generation_config.json says: {sampling}")
    ends = defaults.eos_ids
    if ends is None:  # nothing says: a tokenizer of ours does
        ends = [i for i in [tokenizer.token_to_id(END_OF_TEXT)] if i is not None]
    answer = _one if args.prompts is None else _many
    if composition is not None:
        answer = functools.partial(_composed, composition)
    answer(args, config, tokenizer, sampling, list(ends))


def _load(args: argparse.Namespace) -> Decoder:
    """Returns the model, with the iterations that are asked for."""
    import jax.numpy as jnp

    from hybrid_jax.convert import load_model
    from hybrid_jax.parameters import with_iterations

    return with_iterations(load_model(args.model, dtype=jnp.float32), args.gka_iterations)


def _one(args: argparse.Namespace, config: ModelConfig, tokenizer: Tokenizer, sampling: Sampling, ends: list[int]) -> None:
    """Continues the prompt and prints it."""
    import dataclasses

    from hybrid_jax.data.chat import ChatTemplate
    from hybrid_jax.data.tokenizer import decode_continuation, encode_prompt
    from hybrid_jax.generation import check_prompts, generate

    prompt = _prompt(args)
    if args.chat:
        messages = [{"role": "system", "content": args.system}] if args.system is not None else []
        messages.append({"role": "user", "content": prompt})
        text = ChatTemplate(args.model).render(messages, add_generation_prompt=True)
    else:
        text = prompt
    # Chat templates write the tokens that begin a document themselves.
    ids = tokenizer.encode(text, add_special_tokens=False).ids if args.chat else encode_prompt(tokenizer, text)
    check_prompts(config, [ids], args.max_new_tokens)
    options = dict(max_new_tokens=args.max_new_tokens, eos_id=ends, seed=args.seed, **dataclasses.asdict(sampling))
    (new,) = generate(_load(args), [ids], **options)
    print(tokenizer.decode(new) if args.chat else prompt + decode_continuation(tokenizer, ids, new))


def _composed(
    composition: Composition,
    args: argparse.Namespace,
    config: ModelConfig,
    tokenizer: Tokenizer,
    sampling: Sampling,
    ends: list[int],
) -> None:
    """Continues the question behind a prompt that is read in chunks, and prints all.

    Raises:
      ValueError: a text has no tokens, or the model cannot read them so.
    """
    import dataclasses

    from hybrid_jax.composition import generate_composed
    from hybrid_jax.data.tokenizer import decode_continuation, encode_prompt

    def encoded(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    prompt = _prompt(args)
    prefix = encode_prompt(tokenizer, args.prefix) if args.prefix else []  # what is first begins as a document does
    context, question = encoded(prompt) if prefix else encode_prompt(tokenizer, prompt), encoded(args.question)
    if not context or not question:
        raise ValueError("--compose needs a PROMPT and a --question of at least one token each")
    composition.check(config)
    composition.check_positions(config, len(prefix), len(context), len(question) + args.max_new_tokens)
    options = dict(max_new_tokens=args.max_new_tokens, eos_id=ends, seed=args.seed, **dataclasses.asdict(sampling))
    new = generate_composed(_load(args), context, question, composition=composition, prefix=prefix, **options)
    print(f"{args.prefix or ''}{prompt}{args.question}" + decode_continuation(tokenizer, [*prefix, *context, *question], new))


def _many(args: argparse.Namespace, config: ModelConfig, tokenizer: Tokenizer, sampling: Sampling, ends: list[int]) -> None:
    """Answers the file of prompts."""
    import dataclasses
    import functools

    from hybrid_jax.data.chat import ChatTemplate
    from hybrid_jax.data.prompts import read_prompts
    from hybrid_jax.data.tokenizer import decode_continuation, encode_prompt
    from hybrid_jax.files import check_new_file, file_hash, model_files
    from hybrid_jax.generation import check_prompts
    from hybrid_jax.generation.answers import answer_prompts
    from hybrid_jax.parallel.distributed import notice, say

    out = pathlib.Path(args.out)
    check_new_file(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already; choose another --out, or remove it")
    prompts, unread = read_prompts(args.prompts, functools.partial(ChatTemplate, args.model), chat=args.chat, system=args.system)
    ids = []
    for prompt in prompts:
        chat = bool(prompt.messages)  # its template has written the tokens that begin a document
        ids.append(tokenizer.encode(prompt.text, add_special_tokens=False).ids if chat else encode_prompt(tokenizer, prompt.text))
        try:
            check_prompts(config, ids[-1:], args.max_new_tokens)
        except ValueError as e:
            raise ValueError(f"{args.prompts}, line {prompt.line}: {e}") from None
    if plain := sum(not prompt.messages for prompt in prompts):
        notice(
            f"{args.prompts}: {plain:,} prompts are continued as plain text; `prepare` sends prompts and completions through the "
            "chat template, so give --chat for answers to learn from"
        )
    if unread:
        notice(f"{args.prompts}: not copied to the answers: {', '.join(f'{n!r} of {k:,} lines' for n, k in unread.items())}")
    how = dict(max_new_tokens=args.max_new_tokens, samples=args.samples, seed=args.seed)
    stats = {p.name: p.stat() for p in model_files(args.model)}
    settings = {
        "prompts": file_hash(args.prompts),
        "model": str(pathlib.Path(args.model).absolute()),
        "files of the model": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "gka_iterations": config.gka_iterations,
        **dict(chat=args.chat, system=args.system, end_ids=ends, **how, **dataclasses.asdict(sampling)),
    }

    def decode(prompt: Prompt, ids: Sequence[int], new: list[int]) -> str:
        return tokenizer.decode(new) if prompt.messages else decode_continuation(tokenizer, list(ids), new)

    found = answer_prompts(
        functools.partial(_load, args),
        prompts,
        ids,
        out,
        decode=decode,
        settings=settings,
        sampling=sampling,
        eos_ids=ends,
        batch_size=args.batch_size,
        **how,
    )
    say(f"{out}: {found.answers:,} answers to {len(prompts):,} prompts")
    if found.limited:
        say(
            f"{found.limited:,} of them end by --max-new-tokens {args.max_new_tokens}, not by an end token (finish_reason is "
            "'length'); learned as they are, they teach to stop in the middle"
        )
    if found.empty:
        say(f"{found.empty:,} of them are empty")
