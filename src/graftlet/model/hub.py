# SPDX-License-Identifier: Apache-2.0
"""Adapters to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def upload(folder: Path, repo_id: str | None = None, **kwargs: Any) -> Any:
    """Upload a saved adapter to the hub, making the repository where there is none."""
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.get("token"))
    name = api.create_repo(repo_id or folder.name, private=kwargs.get("private"), exist_ok=True).repo_id
    message = kwargs.get("commit_message") or "Upload adapter"
    return api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, revision=kwargs.get("revision"))
