"""Writing keys into a recipe: only a value's own characters change, its comments and the order of its keys stay."""

from pathlib import Path
from typing import Any

import yaml

from ..files import write_text
from ..heads.targets import Targets

_KEY = "hera_heads"


def write_run_yaml(recipe: Path, overrides: dict[str, Any], heads: Targets, heads_file: Path, target: Path) -> None:
    """Writes the recipe that trains with the selected heads; it names their file, which says where they come from."""
    text = recipe.read_text(encoding="utf-8")
    for key, value in {**overrides, "stage": "hera", _KEY: str(heads_file)}.items():
        written = yaml.safe_dump(value, default_flow_style=True, width=4096)
        text = _with_key(text, key, written.removesuffix("...\n").strip())
    header = (
        f"# {recipe} with the heads that were selected: {' '.join(heads.names)}\n"
        f"# Start it in the same folder:\n#   llamafactory-cli train {target}\n\n"
    )
    write_text(target, header + text)


def set_heads_in_place(recipe: Path, heads: Targets) -> None:
    """Writes the heads' names into the recipe itself; nothing else of it changes."""
    try:
        write_text(recipe, _with_key(recipe.read_text(encoding="utf-8"), _KEY, str(heads)))
    except OSError as error:
        raise ValueError(f"The recipe {recipe} cannot be written ({error.strerror or error}).") from error


def _with_key(text: str, key: str, value: str) -> str:
    """The recipe with a key's value, as YAML, instead of its old one, or with a new key in front of its like."""
    root = yaml.compose(text)
    if isinstance(root, yaml.MappingNode) and root.flow_style:  # JSON
        text = yaml.safe_dump(yaml.safe_load(text), sort_keys=False)
        root = yaml.compose(text)
    nodes = {name.value: (name, old) for name, old in root.value} if root is not None else {}
    if key in nodes:
        name, old = nodes[key]
        start = name.end_mark.index
        while isinstance(old, yaml.CollectionNode) and not old.flow_style:
            # the end of a block is where the next key begins, behind comments
            old = old.value[-1][1] if isinstance(old, yaml.MappingNode) else old.value[-1]
        end = start + len(text[start : old.end_mark.index].rstrip())
        return f"{text[:start]}: {value}{text[end:]}"
    ours = [name.start_mark.index for word, (name, _) in nodes.items() if word.startswith("hera_")]
    if ours and key.startswith("hera_"):
        return f"{text[: min(ours)]}{key}: {value}\n{text[min(ours) :]}"
    end = "" if text.endswith("\n") or not text else "\n"
    return f"{text}{end}{key}: {value}\n"
