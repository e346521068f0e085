"""Writing keys into a recipe: only a value's own characters change; what cannot be changed so is left alone.

A value is spliced into the text: ruamel.yaml, which keeps comments, rewrites indentation, JSON and line ends.
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from ..files import write_text
from ..heads.targets import Targets

_KEY = "hera_heads"


class _Quoting(yaml.SafeDumper):
    """Writes a flow mapping's values, so that JSON stays JSON and a comma in a text stays its own."""


_Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def write_run_yaml(recipe: Path, overrides: dict[str, Any], heads: Targets, heads_file: Path, target: Path) -> None:
    """Writes the recipe that trains with the selected heads; it names their file, which says where they come from."""
    keys, text = {**overrides, "stage": "hera", _KEY: str(heads_file)}, _read(recipe).removeprefix("\ufeff")
    try:
        for key, value in keys.items():
            text = _with_key(text, key, value)
    except ValueError:  # a new file need not look like the old one
        text = yaml.safe_dump((yaml.safe_load(text) or {}) | keys, sort_keys=False)
    header = (
        f"# {recipe} with the heads that were selected: {' '.join(heads.names)}\n"
        f"# Start it in the same folder:\n#   llamafactory-cli train {target}\n\n"
    )
    write_text(target, header + text)


def set_heads_in_place(recipe: Path, heads: Targets, check_only: bool = False) -> None:
    """Writes the heads' names into the recipe itself; links, mode, line ends and everything else of it stay.

    Args:
        recipe: The file.
        heads: Whose names are written.
        check_only: Nothing is written; what would be refused is.

    Raises:
        ValueError: The file cannot be written, or not without changing more than this key.
    """
    try:
        text = _with_key(_read(recipe), _KEY, str(heads))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"--in-place: {recipe} is left as it is, as {' '.join(str(error).split())}; write {_KEY}: into it "
            "yourself, or leave --in-place out."
        ) from error
    if not check_only:
        write_text(recipe, text)
    elif not os.access(recipe, os.W_OK):
        raise ValueError(f"--in-place: {recipe} cannot be written; make it writable, or leave --in-place out.")


def _read(recipe: Path) -> str:
    with recipe.open(encoding="utf-8", newline="") as file:  # keeps line ends
        return file.read()


def _with_key(text: str, key: str, value: Any) -> str:
    """The recipe with a key's value instead of its old one, or with a new key in front of its like.

    Raises:
        ValueError: That would change more than the key.
    """
    root: Any = yaml.compose(text, yaml.SafeLoader)
    before = yaml.safe_load(text) or {}
    if not isinstance(before, dict):
        raise ValueError("it is not a mapping of keys to values")
    flow = isinstance(root, yaml.MappingNode) and root.flow_style
    dumper: Any = _Quoting if flow else yaml.SafeDumper
    written = yaml.dump(value, Dumper=dumper, default_flow_style=True, width=math.inf, allow_unicode=True)
    written, line = written.removesuffix("...\n").strip(), "\r\n" if "\r\n" in text else "\n"
    opened = text.index("{", root.start_mark.index) + 1 if flow else 0
    indent = "" if root is None else " " * root.start_mark.column
    wanted = _as_read(before | {key: value})
    for changed in _spliced(text, key, written, line, opened, indent):
        with suppress(yaml.YAMLError):
            if _as_read(yaml.safe_load(changed)) == wanted:
                return changed
    raise ValueError(f"{key} cannot be set there without changing something else")


def _as_read(content: Any) -> Any:
    # as text: NaN is not itself, and 1 is True
    return isinstance(content, dict) and {repr(key): repr(value) for key, value in content.items()}


def _spliced(text: str, key: str, written: str, line: str, opened: int, indent: str) -> Iterator[str]:
    """The text with a key set in the ways that look best, which some YAML does not allow."""
    entries = list(_entries(text))
    for name, _, behind, start, end in entries:
        if name == key:
            colon = text.find(":", behind, start) + 1
            if not text[colon:start].strip():  # on the key's line; not where a comment stands between
                yield f"{text[:colon]} {written}{text[end:]}"
            yield f"{text[:start]}{written}{text[end:]}"
            return
    if opened:
        start = entries[0][1] if entries else opened
        yield f'{text[:start]}"{key}": {written}{", " if entries else ""}{text[start:]}'
        return
    like = [start for name, start, *_ in entries if name.startswith("hera_") and key.startswith("hera_")]
    for start in like[:1]:
        yield f"{text[:start]}{key}: {written}{line}{indent}{text[start:]}"
    yield f"{text}{'' if text.endswith(line) or not text else line}{indent}{key}: {written}{line}"


def _entries(text: str) -> Iterator[tuple[str, int, int, int, int]]:
    """Of each key its name, and where its characters and those of its value begin and end."""
    depth = 0
    nodes: list[list[Any]] = []  # of the root's keys and values in turn: first event, begin, end
    events: Iterator[Any] = yaml.parse(text, yaml.SafeLoader)
    for event in events:
        first, last = event.start_mark.index, event.end_mark.index
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth == 1 and hasattr(event, "anchor"):  # begins a node
            nodes.append([event, first, first])
        if nodes and depth and first < last:  # the end of a block of lines is where the next key begins
            nodes[-1][2] = first + len(text[first:last].rstrip())
        depth += isinstance(event, yaml.CollectionStartEvent)
    for (name, begin, behind), (_, start, end) in zip(nodes[::2], nodes[1::2], strict=True):
        yield getattr(name, "value", ""), begin, behind, start, end
