"""Selected heads or layers on the hub: ``heads push`` shares them with a card, and ``heads pull`` fetches them."""

import json
import os
from pathlib import Path
from typing import Any

from ..files import RUN_FOLDER, write_text
from ..heads.paper import without_folder
from ..heads.targets import Targets, file_name
from ..hub import fetch_first
from .scores import ScoreFile

_FILES, _PAGE = (file_name("head"), file_name("layer")), "README.md"
_CARD = """---
tags: [hera, hera-heads]{base}
---
# The {what} of {model} for HeRA

With `hera_{what}: hf:{repository}`, a run aligns these {what} with {teacher}, using [Head-Wise Representation
Alignment](https://arxiv.org/abs/2606.23885). A run with another model or another teacher refuses them.

{firmness}

| provenance | |
|---|---|
{provenance}
"""


def push(source: str | os.PathLike, repository: str, private: bool = False) -> str:
    """Uploads a selection's file, or the one in a run's folder, with a card; returns the repository's address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    inside = (Path(source, folder, name) for folder in (RUN_FOLDER, ".") for name in _FILES)
    path = next(filter(Path.is_file, inside), Path(source))
    if not path.is_file() or "model_fingerprint" not in (file := ScoreFile.load(path)).provenance:
        raise ValueError(f"heads: {source} contains no {_FILES[0]} of a selection; give a run that selected heads.")
    chosen = Targets(file.chosen.items, {name: _public(value) for name, value in file.provenance.items()})
    content = {chosen.plural: chosen.names, "provenance": chosen.provenance}
    files = {file_name(chosen.granularity): json.dumps(content, indent=2), _PAGE: _card(file, chosen, repository)}
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        held = Path(api.hf_hub_download(repository, _PAGE)) if api.file_exists(repository, _PAGE) else None
        if held is None or "hera-heads" in held.read_text(encoding="utf-8"):
            changes = [CommitOperationAdd(name, text.encode()) for name, text in files.items()]
            return str(api.create_commit(repository, changes, commit_message="Heads for HeRA").repo_url)
    except Exception as error:  # errors of the client and of its HTTP library have no common base class
        raise ValueError(f"heads: {repository} cannot be written ({' '.join(str(error).split())[:200]}).") from error
    raise ValueError(f"heads: {repository} has a {_PAGE} about something else; give a separate repository.")


def pull(repository: str, folder: str | os.PathLike) -> Path:
    """Fetches the file of a selection into a folder, and returns its path; refuses to replace another file."""
    fetched = fetch_first(repository, _FILES, "heads")
    Targets.load(fetched, key="heads")
    text, path = fetched.read_text(encoding="utf-8"), Path(folder, fetched.name)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"heads: {path} exists and is another file; give another folder.")
    write_text(path, text)
    return path


def _public(value: Any) -> Any:
    """Removes the folders from local paths, because they reveal something about this machine."""
    if isinstance(value, list):
        return [_public(each) for each in value]
    return without_folder(value) if isinstance(value, str) else value


def _card(file: ScoreFile, chosen: Targets, repository: str) -> str:
    origin, omitted = chosen.provenance, ("scores", "layer_scores", "firmness")
    entries = {"k": file.k} | {name: value for name, value in origin.items() if value and name not in omitted}
    values = {**origin, "repository": repository, "what": chosen.plural, "firmness": file.firmness.markdown}
    values["base"] = f"\nbase_model: {origin['model']}" if "/" in origin["model"] else ""
    values["provenance"] = "\n".join(f"| {name} | {str(value).replace('|', ' ')} |" for name, value in entries.items())
    return _CARD.format(**values)
