"""Models by their names on a hub: downloaded with `huggingface_hub`, where it is installed; directories always go first."""

from __future__ import annotations

import pathlib
import re
from typing import Any

from hybrid_jax.convert.weights import INDEX, SINGLE, named_shards
from hybrid_jax.parallel.distributed import say

# What a conversion reads beside the weights: configs, tokenizers and the index; no pickles, no code.
FILES = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
NOT = ("*/*",)  # folders hold other formats
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _weights(directory: pathlib.Path) -> list[str]:
    """Returns the names of the files that hold the weights: those of the index, or one; no second copy in another precision."""
    return named_shards(directory) if (directory / INDEX).is_file() else [SINGLE]


def local_model(name: str) -> str:
    """Returns the directory of a model: `name` itself if something is there, else a download of `ORGANIZATION/MODEL`.

    A download that was stopped goes on where it was, and files that are there already are not downloaded again; revision and
    cache are those of `huggingface_hub` (`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`).

    Args:
      name: a directory, or a name on the hub, with `@REVISION` for another one than `main`.

    Raises:
      FileNotFoundError: there is no such directory, and `name` cannot be downloaded; says why.
    """
    repository, _, revision = name.partition("@")
    if pathlib.Path(name).exists() or not _NAME.fullmatch(repository):
        return name
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
    except ImportError:
        raise FileNotFoundError(
            f"there is no directory {name}; to download {repository} from the hub, install it: pip install huggingface_hub"
        ) from None
    say(f"{name}: no such directory, asking the hub for it")
    try:
        options: dict[str, Any] = dict(revision=revision or None, ignore_patterns=list(NOT))
        directory = snapshot_download(repository, allow_patterns=list(FILES), **options)
        directory = snapshot_download(repository, allow_patterns=_weights(pathlib.Path(directory)), **options)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
        reason = str(e).strip().partition("\n")[0]
        raise FileNotFoundError(f"there is no directory {name}, and the hub did not give {repository}: {reason}") from None
    say(f"{name}: {directory}")
    return directory
