"""A model directory as a model of the lm-evaluation-harness."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hybrid_jax.checks import check_integer
from hybrid_jax.convert import check_model_directory, load_model
from hybrid_jax.data import check_tokenizer_fits, load_tokenizer
from hybrid_jax.data.chat import ChatTemplate, read_template, template_fingerprint
from hybrid_jax.data.tokenizer import end_of_text_id
from hybrid_jax.evaluate.lm_eval.options import GenerationOptions
from hybrid_jax.evaluate.lm_eval.scoring import Score, Scorer
from hybrid_jax.files import find_shipped, model_hashes
from hybrid_jax.generation import bucket, generate, generation_defaults
from hybrid_jax.iterations import Iterations, read_iterations
from hybrid_jax.parallel.distributed import notice
from hybrid_jax.parallel.mesh import check_mesh_fits, make_mesh, parse_mesh
from hybrid_jax.parameters import with_iterations
from hybrid_jax.progress import progress_bar

WHOSE = "hybrid_jax: whose answers"  # in a cache of the harness, the key beside those of the requests


class HybridLM(TemplateLM):
    """A Transformer or a hybrid that `load_model` reads, with its tokenizer.

    Scores, windows, truncation, special tokens and stop texts follow the harness's own class for transformers (`HFLM`), so that
    numbers can be compared. Results do not depend on `batch_size` but by rounding, except what is sampled.

    Args:
      pretrained: the model directory.
      batch_size: rows at a time; programs have exactly so many.
      max_length: tokens of an input; default: the model's `max_position_embeddings`.
      dtype: of parameters and activations; logits and log-probabilities are float32.
      prefix_token_id: what an empty context is replaced by; default: the tokenizer's token that begins a text, or else the
        one that ends it.
      add_bos_token: whether texts are encoded with the tokenizer's special tokens; default: True.
      seed: of what is sampled.
      max_batch_size, device: of the harness; they have no effect, which is reported.
      mesh: axes of devices, `data=4,tensor=2` or, where the harness's own command reads it, `data:4;tensor:2`; empty: one device.
        Of a job of several processes every one gets the same results.
      gka_iterations: of Gated KalmaNet, see `hybrid_jax.with_iterations`; as text `8`, `3:8,5:4` or, where the harness's own
        command reads it, `3:8;5:4`. None: as in config.json.

    Raises:
      ValueError, FileNotFoundError: no usable model or tokenizer, a wrong option, or a job of several processes without a mesh.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        batch_size: int | str = 8,
        max_length: int | None = None,
        dtype: str = "float32",
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        seed: int = 0,
        max_batch_size: int | None = None,
        device: str | None = None,
        mesh: str = "",
        gka_iterations: Iterations | str | None = None,
    ):
        super().__init__()
        for name, value in (("max_batch_size", max_batch_size), ("device", device)):
            if value is not None:
                notice(f"lm_eval: {name} = {value} has no effect; batch_size and JAX's own choice of device decide")
        rows = int(batch_size) if isinstance(batch_size, str) and batch_size.isdigit() else batch_size
        self.batch_size = check_integer("batch_size", rows, minimum=1)
        self.seed, self.add_bos_token = check_integer("seed", seed), add_bos_token
        self.directory = find_shipped(pretrained)
        if gka_iterations is not None:
            given = gka_iterations.replace(";", ",") if isinstance(gka_iterations, str) else gka_iterations
            gka_iterations = read_iterations("gka_iterations", given)
        self.config = config = check_model_directory(self.directory).with_iterations(gka_iterations)
        self.tokenizer = check_tokenizer_fits(load_tokenizer(self.directory), config.vocab_size, self.directory)
        most = config.max_position_embeddings if max_length is None else max_length
        self.max_length = check_integer("max_length", most, minimum=1)
        if self.max_length > config.max_position_embeddings and any(layer.attends for layer in config.layers):
            raise ValueError(f"max_length is {max_length}, the model has {config.max_position_embeddings} positions")
        special = {n: self.tokenizer.token_to_id(text) for n, text in read_template(self.directory)[1].items()}
        named = special.get("eos_token")
        self._eot = end_of_text_id(self.tokenizer, config.extra.get("eos_token_id")) if named is None else named
        bos = special.get("bos_token")
        prefix = prefix_token_id if prefix_token_id is not None else self._eot if bos is None else bos
        self._prefix = check_integer("prefix_token_id", prefix, minimum=0, maximum=config.vocab_size - 1)
        self._prefix_text = self.tokenizer.decode([self._prefix], skip_special_tokens=False)
        self._ends = sorted({self._eot, *(generation_defaults(self.directory, config).eos_ids or ())})
        self.mesh = make_mesh(parse_mesh(mesh.replace(";", ",").replace(":", "="))) if mesh else None
        if self.mesh is None and jax.process_count() > 1:
            raise ValueError("lm_eval: a job of several processes needs a mesh of all their devices, e.g. data=8")
        if self.mesh is not None:
            check_mesh_fits(config, self.mesh)
        self.model = with_iterations(load_model(self.directory, dtype=dtype, mesh=self.mesh), gka_iterations)
        self.scorer = Scorer(self.model, self.batch_size, self.mesh)
        self.truncated: dict[str, Counter[str]] = {}  # by method: how many inputs were truncated, by how many tokens
        self._without_system = False  # whether it was reported that the template refuses system messages

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Takes the harness's stored answers (`use_cache`), which go by the requests alone, if they are this model's.

        Raises:
          ValueError: they are of another model or of other options, or nothing says whose they are; names a difference.
        """
        stored: Any = cache_hook.dbdict
        if stored is not None:
            own: dict[str, Any] = {name: getattr(self, name) for name in ("max_length", "add_bos_token", "prefix_token_id", "seed")}
            own |= {"dtype": self.model.compute_dtype.name, "gka_iterations": list(self.config.gka_iterations)}
            own |= model_hashes(self.directory)
            found = stored.get(WHOSE, {} if len(stored) else own)
            if differ := [name for name in {**found, **own} if found.get(name) != own.get(name)]:
                whose = f"answers of a model with another {differ[0]}" if found else "answers, and nothing says of which model"
                raise ValueError(f"use_cache: {stored.filename} holds {whose}; name another file, or remove it")
            stored[WHOSE] = own
        super().set_cache_hook(cache_hook)

    @property
    def eot_token_id(self) -> int:
        """The id of the token that ends a document."""
        return self._eot

    @property
    def prefix_token_id(self) -> int:
        """The id of the token that takes the place of an empty context."""
        return self._prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the ids of a text.

        Args:
          add_special_tokens: whether the tokenizer adds the tokens that begin and end texts. None: as the constructor's
            `add_bos_token` says, but never to a text that begins with the prefix token already.
        """
        del kwargs
        if add_special_tokens is None:
            begins = bool(self._prefix_text) and string.startswith(self._prefix_text)
            add_special_tokens = not begins and self.add_bos_token is not False
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens).ids

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns (log-probability of the continuation in nats, whether it is the greedy one) of (context, continuation) requests.

        Raises:
          ValueError: a continuation without tokens, or with more than `max_length`.
        """
        for request in requests:
            if not _arguments(request)[1]:
                raise ValueError(f"a request of {_task(request)} has an empty continuation; a choice needs at least one character")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        found: list[Any] = [None] * len(requests)
        # A context of spaces alone has no tokens: the harness moves them to the continuation. It counts as an empty one.
        queries = [(context or [self.prefix_token_id], target) for _, context, target in requests]
        for n, score in self._scored("loglikelihood", queries, disable_tqdm):
            found[n] = tuple(score)
            self.cache_hook.add_partial("loglikelihood", requests[n][0], found[n])
        return found

    def _scored(
        self, method: str, queries: Sequence[tuple[list[int], list[int]]], disable_tqdm: bool
    ) -> Iterator[tuple[int, Score]]:
        """Yields (number, score) of all (context, continuation) queries, with a progress bar.

        Raises:
          ValueError: see `loglikelihood`.
        """
        for _, continuation in queries:
            if not 1 <= len(continuation) <= self.max_length:
                text = self.tokenizer.decode(continuation)
                raise ValueError(
                    f"the continuation {text[:60]!r} has {len(continuation)} tokens of its own; it needs 1 to {self.max_length} "
                    "(max_length): a tokenizer may merge a short one into its context"
                )
        self._report(method, [len(context) + len(target) - 1 for context, target in queries], self.max_length)
        with progress_bar(name=method, unit="request", total=len(queries), shown=not disable_tqdm) as bar:
            for n, score in self.scorer(queries, self.max_length):
                yield n, score
                bar.update(1)

    def _report(self, method: str, lengths: Sequence[int], most: int) -> None:
        """Counts the inputs of more than `most` tokens, which are truncated on the left, and says so."""
        beyond = [length - most for length in lengths if length > most]
        self.truncated.setdefault(method, Counter()).update(inputs=len(beyond), tokens=sum(beyond))
        if beyond:
            notice(
                f"{method}: {len(beyond)} of {len(lengths)} inputs are longer than {most} tokens and are truncated on the left, by "
                f"{sum(beyond)} tokens in all"
            )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each text in nats, from windows of `max_length` tokens as the harness defines them."""
        windows, owners = [], []
        for n, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append(make_disjoint_window(window))
                owners.append(n)
        left = Counter(owners)  # windows that are not computed yet
        totals = [0.0] * len(requests)
        for n, request in enumerate(requests):
            if not left[n]:
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, 0.0)
        for at, score in self._scored("loglikelihood_rolling", windows, disable_tqdm):
            n = owners[at]
            totals[n] += score.log_probability
            left[n] -= 1
            if not left[n]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[n].args, totals[n])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Returns the answers to (context, generation options) requests; see `GenerationOptions` for the options.

        Prompts are truncated on the left to `max_length - max_gen_toks` tokens. An answer ends before the first stop text, at the
        tokenizer's or the model's end token, or after `max_gen_toks` tokens.

        Raises:
          ValueError: a wrong option, or no room for a prompt.
        """
        eos = self.tokenizer.decode([self._eot], skip_special_tokens=False)
        batches: dict[GenerationOptions, list[int]] = {}
        for n, request in enumerate(requests):
            options = GenerationOptions.from_task(_arguments(request)[1], eos)
            if options.max_new_tokens >= self.max_length:
                raise ValueError(
                    f"{_task(request)} asks for {options.max_new_tokens} new tokens (max_gen_toks) and max_length is "
                    f"{self.max_length}: no token would be left for the prompt"
                )
            batches.setdefault(options, []).append(n)
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        answers, batch = [""] * len(requests), 0
        with progress_bar(name="generate_until", unit="request", total=len(requests), shown=not disable_tqdm) as bar:
            for options, numbers in batches.items():
                room = self.max_length - options.max_new_tokens
                self._report("generate_until", [len(prompts[n]) for n in numbers], room)
                numbers.sort(key=lambda n: -len(prompts[n]))
                for begin in range(0, len(numbers), self.batch_size):
                    part = numbers[begin : begin + self.batch_size]
                    texts = self._continued([prompts[n][-room:] for n in part], options, self.seed + batch)
                    batch += 1
                    for n, text in zip(part, texts, strict=True):
                        answers[n] = text
                        self.cache_hook.add_partial("generate_until", requests[n].args, text)
                    bar.update(len(part))
        return answers

    def _continued(self, prompts: list[list[int]], options: GenerationOptions, seed: int) -> list[str]:
        """Returns the answers to a batch of prompts; missing rows are filled up with prompts whose answers end at once."""
        # A text of n bytes is within the last n tokens that have a byte; some more may be special tokens or parts of a character.
        last = 8 + max(len(text.encode()) for text in options.until)

        def ended(row: int, new: list[int]) -> bool:
            if row >= len(prompts):
                return True
            tail, decode = new[-last:], functools.partial(self.tokenizer.decode, skip_special_tokens=False)
            return any(text in decode(tail) for text in options.until) and any(text in decode(new) for text in options.until)

        filled = prompts + [[self._eot]] * (self.batch_size - len(prompts))
        found = generate(
            self.model,
            filled,
            max_new_tokens=options.max_new_tokens,
            eos_id=self._ends,
            seed=seed,
            ended=ended,
            padded_to=bucket(max(map(len, prompts))),
            mesh=self.mesh,
            **dataclasses.asdict(options.sampling),
        )
        texts = [self.tokenizer.decode(new) for new in found[: len(prompts)]]
        return [postprocess_generated_text(text, list(options.until), None) for text in texts]

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.directory)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as the model reads it, rendered by its chat template.

        A template that refuses system messages renders the others, which is reported.

        Args:
          chat_history: {role, content} each.
          add_generation_prompt: end with what begins an answer; else the last message is left open, to be continued.

        Raises:
          ValueError: the directory has no chat template, or the template refuses the conversation.
        """
        options = dict(add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt)
        try:
            return self._template.render(chat_history, **options)
        except ValueError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            text = self._template.render(rest, **options)
            if not self._without_system:
                notice("the chat template refuses system messages; they are left out")
            self._without_system = True
            return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the source of the model's chat template; None if it is not to be applied.

        Raises:
          ValueError: a template's name other than `default`, or the directory has no template.
        """
        if chat_template is False or chat_template is None:
            return None
        if chat_template not in (True, "default"):
            raise ValueError(f"only the default chat template can be used, got the name {chat_template!r}")
        return self._template.template

    @property
    def tokenizer_name(self) -> str:
        """A name of the tokenizer and its chat template, by which the harness stores rendered requests."""
        content = (self.directory / "tokenizer.json").read_bytes() + template_fingerprint(self.directory).encode()
        return f"{self.directory.absolute()}".replace("/", "__") + "__" + hashlib.sha256(content).hexdigest()[:12]

    def get_model_info(self) -> dict[str, Any]:
        """Returns what is stored with the results: the model, and how much was truncated."""
        return {
            "model_name": str(self.directory),
            "model_pattern": self.config.pattern,
            "model_num_parameters": sum(x.size for x in self.scorer.parameters.values()),
            "gka_iterations": list(self.config.gka_iterations) or None,
            "model_dtype": self.model.compute_dtype.name,
            "max_length": self.max_length,
            "truncated": self.truncated,
        }


def _arguments(request: Instance) -> tuple[Any, ...]:
    return request.args


def _task(request: Instance) -> str:
    return f"the task {request.task_name!r}" if request.task_name else "a task"


register_model("hybrid_jax")(HybridLM)  # as a decorator it would hide the class from type checkers
