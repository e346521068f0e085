"""Changes the keys of a recipe with ruamel.yaml, which keeps comments, quotes, anchors and order."""

import io
import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import yaml
from ruamel.yaml import YAML

from ..files import write_text


class RecipeFile(NamedTuple):
    """A recipe that is read once, because its file may be a pipe or may change while heads are scored."""

    path: Path
    text: str

    @classmethod
    def read(cls, path: str | os.PathLike) -> Self:
        """Reads a YAML or JSON file; raises ``ValueError`` if that fails."""
        try:
            return cls(Path(path), Path(path).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"The recipe {path} cannot be read ({error}).") from error

    def with_keys(self, keys: Mapping[str, Any]) -> str:
        """Returns the text with new values of some keys, keeping comments and layout if ruamel.yaml can."""
        with suppress(TypeError, ValueError):
            return json.dumps({**json.loads(self.text), **keys}, indent=2, ensure_ascii=False) + "\n"
        try:
            wanted = {**(yaml.safe_load(self.text) or {}), **keys}
        except (TypeError, yaml.YAMLError) as error:
            why = " ".join(str(error).split())
            raise ValueError(f"{self.path} is not a mapping of keys ({why}); write key: value lines.") from error
        with suppress(Exception):  # ruamel.yaml raises errors of any kind where it cannot keep a comment
            changed = _round_trip(self.text, keys)
            # compared as text, because NaN does not equal itself and 1 equals True
            if sorted(map(repr, yaml.safe_load(changed).items())) == sorted(map(repr, wanted.items())):
                return changed
        return yaml.safe_dump(wanted, sort_keys=False)

    def set_in_place(self, keys: Mapping[str, Any], check_only: bool = False) -> None:
        """Sets keys in the file, and keeps its mode and links; with ``check_only``, only raises the errors."""
        text, problem = self.with_keys(keys), ""
        if not (self.path.is_file() and os.access(self.path, os.W_OK)):
            problem = "is not a writable file"
        elif RecipeFile.read(self.path) != self:
            problem = "was edited since it was read"
        elif lost := [line for line in re.findall(r"(?:^|\s)(#.*\S)", self.text, re.MULTILINE) if line not in text]:
            problem = f"would lose the comment {lost[0]!r}"
        if problem:
            raise ValueError(f"--in-place: {self.path} {problem}; set {', '.join(keys)} in it by hand.")
        if not check_only:
            write_text(self.path, text)


def _round_trip(text: str, keys: Mapping[str, Any]) -> str:
    parser, written = YAML(), io.StringIO()
    parser.preserve_quotes, parser.width = True, 1 << 20
    if re.search(r"^ +- ", text, re.MULTILINE):
        parser.indent(mapping=2, sequence=4, offset=2)
    document = parser.load(text)
    # write values as PyYAML does (1.0e-05, not 1e-05), because all parsers agree on these
    document.update(parser.load(yaml.safe_dump(dict(keys))))
    parser.dump(document, written)
    return written.getvalue()
