"""The method names no host and no key of a host: only adapters and the command line know them."""

import re
from pathlib import Path

import llamafactory_hera

PACKAGE = Path(llamafactory_hera.__file__).parent
HOST_WORDS = re.compile(
    r"\b(?:model_name_or_path|adapter_name_or_path|finetuning_type|freeze_\w+|lora_target|flash_attn|dataset_dir"
    r"|media_dir|cutoff_len|stage: \w+|trainer_log|quantization_bit|curriculum_sampling"
    r"|[Ll]+a[Mm][Aa][ -]?(?:Factory|Board)|axolotl|TRL)\b"
)


def lines_with(pattern: re.Pattern, *but: str) -> list[str]:
    """Lists the lines of the package that match a pattern, outside of some files and folders."""
    files = (path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in but)
    return [
        f"{path.relative_to(PACKAGE)}:{number}: {match[0]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (match := pattern.search(line))
    ]


def test_the_method_speaks_of_no_host() -> None:
    assert lines_with(HOST_WORDS, "integrations", "cli.py", "__init__.py") == []


def test_the_library_logs_to_one_logger() -> None:
    """A host that lets this logger through shows all messages; axolotl drops INFO of every other logger."""
    assert lines_with(re.compile(r"getLogger\((?!\"llamafactory_hera\")"), "integrations") == []
