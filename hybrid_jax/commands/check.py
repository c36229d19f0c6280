"""`check`: devices, kernels, collectives, meshes, steps and storage of the machine, on one page."""

from __future__ import annotations

import argparse
import pathlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="a new directory for check.md and check.json; every process must see it"
    )
    parser.add_argument(
        "--parts", nargs="+", metavar="PART", help="of machine, kernels, collectives, meshes, steps and storage; default: all"
    )


def run(args: argparse.Namespace) -> None:
    import json

    from hybrid_jax.check import PARTS, run_checks
    from hybrid_jax.check.page import MARKS, check_page
    from hybrid_jax.checks import check_choice
    from hybrid_jax.files import check_new_directory, write_text
    from hybrid_jax.parallel.distributed import barrier, is_first, say

    parts = args.parts or list(PARTS)
    for part in parts:
        check_choice("--parts", part, PARTS)
    if is_first():
        check_new_directory(args.out)
        args.out.mkdir(parents=True, exist_ok=True)
    barrier("made the directory")
    findings = []
    for finding in run_checks(parts, args.out):
        findings.append(finding)
        say(f"{finding.part:12} {MARKS[finding.passed]:6} {finding.subject}: {finding.claim} {finding.value}".rstrip())
    if is_first():
        write_text(args.out / "check.md", check_page(findings))
        write_text(args.out / "check.json", json.dumps([f._asdict() for f in findings], indent=2) + "\n")
    barrier("wrote the page")
    failed = [f"{f.part}: {f.subject}" for f in findings if f.passed is False]
    page = args.out / "check.md"
    if failed:
        raise ValueError(f"{len(failed)} claims do not hold ({'; '.join(failed[:3])}{' …' if len(failed) > 3 else ''}); see {page}")
    say(f"every claim holds: {page}")
