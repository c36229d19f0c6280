"""`lm-eval MODEL --tasks A,B`: runs tasks of the lm-evaluation-harness, prints its table, writes results.json."""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib

from hybrid_jax.commands.options import add_gka_iterations, directory, integer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("model", type=directory, help="a model directory with its tokenizer, e.g. RUN/model")
    parser.add_argument(
        "--tasks", required=True, metavar="NAME,...", help="tasks, groups or tags of the harness, or of --include-path"
    )
    parser.add_argument("--include-path", metavar="DIR", help="a folder with your own tasks: yaml files")
    parser.add_argument(
        "--num-fewshot", type=integer(minimum=0), help="examples in front of each question, in place of the tasks' own"
    )
    parser.add_argument("--limit", type=integer(minimum=1), help="only so many documents of each task: for a trial")
    parser.add_argument("--apply-chat-template", action="store_true", help="ask by the model's chat template")
    parser.add_argument("--batch-size", type=integer(minimum=1), default=8, help="rows at a time")
    parser.add_argument("--max-length", type=integer(minimum=1), help="tokens of an input; default: all of the model's positions")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of parameters and activations"
    )
    parser.add_argument("--mesh", default="", help="axes of devices, e.g. data=4,tensor=2; default: one device")
    add_gka_iterations(parser)
    parser.add_argument("--out", help="directory for results.json, and with --log-samples for samples_TASK.jsonl")
    parser.add_argument("--log-samples", action="store_true", help="with --out: also write every question with the model's answer")


def _check(args: argparse.Namespace) -> None:
    """Checks what can be checked before the harness is imported.

    Raises:
      ValueError, FileNotFoundError: it is not installed, options do not fit, or a directory is missing or not usable.
    """
    from hybrid_jax.files import check_new_directory, check_writable

    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("the command needs the lm-evaluation-harness: pip install 'hybrid_jax[lm-eval]'")
    if args.log_samples and not args.out:
        raise ValueError("--log-samples needs --out")
    if args.include_path is not None and not pathlib.Path(args.include_path).is_dir():
        raise FileNotFoundError(f"--include-path: there is no folder {args.include_path}")
    if args.out:
        out = pathlib.Path(args.out)
        check_writable(out) if out.is_dir() else check_new_directory(out)


def run(args: argparse.Namespace) -> None:
    """Evaluates, prints the table, and writes the results."""
    _check(args)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    from hybrid_jax.evaluate.lm_eval import HybridLM
    from hybrid_jax.files import write_text
    from hybrid_jax.parallel.distributed import is_first, notice, say

    tasks = [name for name in args.tasks.split(",") if name]
    manager = TaskManager(include_path=args.include_path, metadata={"pretrained": args.model})
    known = {*manager.all_tasks, *manager.all_groups, *manager.all_tags}
    if unknown := [name for name in tasks if name not in known]:
        raise ValueError(f"--tasks: there is no task, group or tag {unknown[0]!r}; `lm-eval ls tasks` lists the harness's own")
    options = {name: getattr(args, name) for name in ("batch_size", "max_length", "dtype", "mesh", "gka_iterations")}
    model = HybridLM(args.model, **options)
    if args.apply_chat_template:
        model.chat_template(True)  # refuses a model without one before any text is downloaded
    results = simple_evaluate(
        model,
        tasks=tasks,
        num_fewshot=args.num_fewshot,
        batch_size=args.batch_size,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        task_manager=manager,
        log_samples=args.log_samples,
    )
    assert results is not None  # it is None in other processes than the first
    say(make_table(results))
    if results.get("groups"):
        say(make_table(results, "groups"))
    if args.out and is_first():
        out = pathlib.Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        earlier = set(out.glob("samples_*.jsonl"))
        for name, samples in (results.pop("samples", None) or {}).items():
            lines = [json.dumps(sample, default=handle_non_serializable, ensure_ascii=False) + "\n" for sample in samples]
            write_text(path := out / f"samples_{name.replace('/', '_')}.jsonl", "".join(lines))
            earlier.discard(path)
        for path in sorted(earlier):
            notice(f"{path} is of an earlier evaluation, not of this one's results.json")
        write_text(out / "results.json", json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n")
        say(f"results: {out / 'results.json'}")
