# SPDX-License-Identifier: Apache-2.0
"""Where a model comes from, and where an adapter goes to: the names of bases, and the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..config import PeftConfig
from ..core import fingerprint
from ..core.fingerprint import Fingerprint
from ..core.host import hosts
from ..core.replace import Replacement
from ..errors import BaseMismatchError, BaseMismatchWarning, strict, warn
from .parts import transformers_config


def base_name(model: nn.Module) -> str | None:
    """Where a transformers model came from."""
    name = getattr(model, "name_or_path", None) or transformers_config(model).get("_name_or_path")
    return str(name) if name else None


def check_base(
    model: nn.Module, known: Fingerprint, config: PeftConfig, recorded: str | None, origin: str, verify: bool
) -> None:
    """Warn, or raise `BaseMismatchError`, where an adapter was saved on another base than it is put on.

    The names are compared, and the model's fingerprint with the one that the file records.
    """
    theirs, ours = config.base_model_name_or_path, base_name(model)
    # a head that was made anew for the task is in no base's files: the adapter brings its own
    replaced = [path for path, host in hosts(model) if isinstance(host, Replacement)]
    apart = "" if recorded is None else fingerprint.parsed(recorded, origin).difference(known, replaced)
    named = theirs and ours and Path(theirs).name.lower() != Path(ours).name.lower()
    unknown = verify and recorded is None
    if not (apart or named or unknown):
        return
    why = apart or ("its file does not record its base" if unknown else "where they differ, its effect does too")
    message = f"{origin} was trained on {theirs or 'an unnamed base'!r} and is put on {ours or type(model).__name__!r}; {why}."
    if unknown or (apart and (verify or strict())):
        raise BaseMismatchError(message)
    warn(BaseMismatchWarning, message, stacklevel=4)


def upload(folder: Path, repo_id: str | None = None, **kwargs: Any) -> Any:
    """Upload a saved adapter to the hub, making the repository where there is none."""
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.get("token"))
    name = api.create_repo(repo_id or folder.name, private=kwargs.get("private"), exist_ok=True).repo_id
    message = kwargs.get("commit_message") or "Upload adapter"
    return api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, revision=kwargs.get("revision"))
