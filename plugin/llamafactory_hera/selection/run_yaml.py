"""Writing the selected heads into a recipe, keeping its comments and the order of its keys."""

from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.nodes import SequenceNode

from ..files import write_text
from ..heads.targets import Targets

KEY = "hera_heads"


def write_run_yaml(
    recipe: Path | None, overrides: dict[str, Any], heads: Targets, heads_file: Path, target: Path
) -> None:
    """Writes the recipe that trains with the selected heads.

    ``hera_heads`` names the heads file, so that training checks where the heads come from and keeps their provenance.
    Paths stay as they are: the host reads them relative to the folder in which it is started, not to the recipe.

    Args:
        recipe: The recipe that selection was started with.
        overrides: Keys given beside it; they become part of it.
        heads: The selected heads, for a comment.
        heads_file: The file that holds them.
        target: The file to write.
    """
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096  # no line of the recipe is folded
    content = yaml.load(recipe.read_text(encoding="utf-8")) if recipe is not None else None
    content = CommentedMap() if content is None else content
    for key, value in overrides.items():
        _set(content, key, value)
    _set(content, "stage", "hera")
    _set(content, KEY, str(heads_file))
    content.yaml_add_eol_comment(str(heads).replace(",", " "), KEY)
    header = (
        f"# {recipe or 'The given settings'} with the heads that were selected. Start it in the same folder:\n"
        f"#   llamafactory-cli train {target}\n\n"
    )
    text = StringIO()
    yaml.dump(content, text)
    write_text(target, header + text.getvalue())


def set_heads_in_place(recipe: Path, heads: Targets) -> None:
    """Writes the heads' names into the recipe itself; nothing else of it changes.

    Raises:
        ValueError: The recipe cannot be written.
    """
    try:
        write_text(recipe, _with_heads(recipe.read_text(encoding="utf-8"), str(heads)))
    except OSError as error:
        raise ValueError(f"The recipe {recipe} cannot be written ({error.strerror or error}).") from error


def _with_heads(text: str, heads: str) -> str:
    # writing the parsed recipe out again would indent its lists anew: only the value's own characters are replaced
    root = YAML().compose(text)
    nodes = {key.value: (key, value) for key, value in root.value} if root is not None else {}
    if KEY in nodes:
        key, value = nodes[KEY]
        last = value.value[-1] if isinstance(value, SequenceNode) and not value.flow_style else value
        return f"{text[: key.end_mark.index]}: {heads}{text[last.end_mark.index :]}"
    ours = [key.start_mark.index for name, (key, _) in nodes.items() if name.startswith("hera_")]
    place = min(ours, default=len(text))
    before = text[:place] if ours or text.endswith("\n") or not text else f"{text}\n"
    return f"{before}{KEY}: {heads}\n{text[place:]}"


def _set(content: CommentedMap, key: str, value: Any) -> None:
    ours = [position for position, name in enumerate(content) if str(name).startswith("hera_")]
    if key in content or not key.startswith("hera_") or not ours:
        content[key] = value
    else:  # heads first, everything else of HeRA behind
        content.insert(ours[0] if key == KEY else ours[-1] + 1, key, value)
