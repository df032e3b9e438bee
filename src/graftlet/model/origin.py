# SPDX-License-Identifier: Apache-2.0
"""Where a model comes from, and where an adapter goes to: the names of bases, and the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..config import PeftConfig
from ..errors import BaseMismatchWarning, warn
from .parts import transformers_config


def base_name(model: nn.Module) -> str | None:
    """Where a transformers model came from."""
    name = getattr(model, "name_or_path", None) or transformers_config(model).get("_name_or_path")
    return str(name) if name else None


def check_base(model: nn.Module, config: PeftConfig, origin: str) -> None:
    theirs, ours = config.base_model_name_or_path, base_name(model)
    if theirs and ours and Path(theirs).name.lower() != Path(ours).name.lower():
        warn(
            BaseMismatchWarning,
            f"{origin} was trained on {theirs!r} and is put on {ours!r}; where they differ, its effect does too.",
            stacklevel=4,
        )


def upload(folder: Path, repo_id: str | None = None, **kwargs: Any) -> Any:
    """Upload a saved adapter to the hub, making the repository where there is none."""
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.get("token"))
    name = api.create_repo(repo_id or folder.name, private=kwargs.get("private"), exist_ok=True).repo_id
    message = kwargs.get("commit_message") or "Upload adapter"
    return api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, revision=kwargs.get("revision"))
