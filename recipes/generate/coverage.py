"""The table in docs/backbones.md of transformers' image-text-to-text models whose heads HeRA reads."""

import math
from pathlib import Path
from typing import Any

import transformers

from llamafactory_hera.heads.families import FAMILIES, head_layout

#: The generator writes between these lines of docs/backbones.md.
MARKS = ("<!-- coverage: generated -->", "<!-- end of coverage -->")

_REASONS = {
    "is an encoder-decoder": "The model is an encoder-decoder.",
    "encoder-decoder cannot be instantiated": "The model is an encoder-decoder.",
    "must contain one text decoder": "The decoder has no list of layers named `layers`.",
    "is not a language model": "The configuration contains no language model.",
    "cannot be built": "transformers cannot build the model with the default configuration.",
}


def read_types() -> tuple[dict[str, str], dict[str, str]]:
    """Reads the heads of each model type from its default configuration.

    Returns:
        The text decoder of each supported type, and the reason for each refused type.
    """
    read, refused = {}, {}
    for config_class in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        try:
            layout = head_layout(_complete(config_class()))
            read[config_class.model_type] = layout.model_type
        except ValueError as error:
            refused[config_class.model_type] = _reason(str(error))
    return read, refused


def _reason(message: str) -> str:
    return next((text for part, text in _REASONS.items() if part in message), message.removeprefix("model: "))


def _complete(config: Any) -> Any:
    """Corrects default configuration values that keep transformers from building the model."""
    text = config.get_text_config()
    if (getattr(text, "pad_token_id", None) or 0) >= getattr(text, "vocab_size", math.inf):
        text.pad_token_id = None
    for part in (config, text):
        if getattr(part, "vocabulary_map", {}) is None:
            part.vocabulary_map = {}
    return config


def table() -> str:
    """Returns the generated lines of docs/backbones.md."""
    read, refused = read_types()
    tested = [name for name, decoder in read.items() if decoder in FAMILIES]
    lines = [
        f"transformers {transformers.__version__} has {len(read) + len(refused)} types of image-text-to-text models. "
        f"HeRA reads the heads of {len(read)}.",
        "",
        "| Status | Types (and the type of the text decoder, if its name differs) |",
        "| --- | --- |",
    ]
    for status, names in (("tested", tested), ("by structure", sorted(set(read) - set(tested)))):
        cells = [f"`{name}`" + (f" (`{read[name]}`)" if _differs(name, read[name]) else "") for name in sorted(names)]
        lines.append(f"| {status} | {', '.join(cells)} |")
    lines += ["", "| Refused | Reason |", "| --- | --- |"]
    for reason in sorted(set(refused.values())):
        names = sorted(name for name, why in refused.items() if why == reason)
        lines.append(f"| {', '.join(f'`{name}`' for name in names)} | {reason} |")
    return "\n".join(lines)


def _differs(name: str, decoder: str) -> bool:
    return decoder not in (name, f"{name}_text", f"{name}_text_model")


def write_table(page: Path) -> None:
    """Writes the table between the marks of docs/backbones.md."""
    before, _, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    page.write_text(f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}", encoding="utf-8")
