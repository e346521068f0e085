"""Private names of other packages are listed, the core package mentions no host, and the library has one logger."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import llamafactory_hera

PACKAGE = Path(llamafactory_hera.__file__).parent
#: Owner and tested version -> the private names that the package uses or overrides. Look here first if a new version
#: of another package breaks something.
PRIVATE_NAMES = {
    "transformers.Trainer 5.5.4": {
        "_get_learning_rate",
        "_get_output_dir",
        "_get_train_sampler",  # HARC overrides it
        "_load_best_model",  # the package overrides this name and the next three
        "_load_from_checkpoint",
        "_load_optimizer_and_scheduler",
        "_save_checkpoint",
        "_prepare_inputs",
        "_set_signature_columns_if_needed",
        "_signature_columns",
    },
    "a model or configuration of transformers 5.5.4": {
        "_attn_implementation",
        "_gradient_checkpointing_func",
        "_keys_to_ignore_on_save",
        "_name_or_path",
    },
    "transformers.integrations.deepspeed 5.5.4": {"_hf_deepspeed_config_weak_ref"},
    "datasets 4.0.0": {"_formatting", "_info"},
    "torch 2.11.0": {"_C", "_current_graph_task_id", "_dynamo"},
    "llamafactory.data.loader 0.9.5": {"_get_dataset_processor", "_get_merged_dataset"},
    "swift.template.Template 4.6.0": {"_replace_image_tags"},
    "llamafactory.webui 0.9.5": {"_parse_train_args"},
}
_PRIVATE = re.compile(r"_(?!_)[A-Za-z]\w*")
_PUBLIC = {"_asdict", "_fields", "_replace"}  # of named tuples


def _defined(tree: ast.Module) -> Iterator[str]:
    """Lists the names that a module defines, including attributes of its own objects."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def _used(tree: ast.Module) -> Iterator[str]:
    """Lists the attributes that a module reads, also through ``getattr``, and the names that it imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr"):
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)


def test_every_private_name_of_another_package_is_listed():
    files = (
        path for name in ("llamafactory_hera", "llamafactory_harc") for path in (PACKAGE.parent / name).rglob("*.py")
    )
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    ours = {name for tree in trees for name in _defined(tree)} | _PUBLIC
    used = {name for tree in trees for name in _used(tree) if _PRIVATE.fullmatch(name)}
    assert used - ours - set.union(*PRIVATE_NAMES.values()) == set()


HOST_WORDS = re.compile(
    r"\b(?:model_name_or_path|adapter_name_or_path|finetuning_type|freeze_\w+|lora_target|flash_attn|dataset_dir"
    r"|media_dir|cutoff_len|stage: \w+|trainer_log|quantization_bit|curriculum_sampling"
    r"|[Ll]+a[Mm][Aa][ -]?(?:Factory|Board)|axolotl|TRL)\b"
)


def lines_with(pattern: re.Pattern, *but: str) -> list[str]:
    """Lists the lines of the package that match a pattern, except in the given files and folders."""
    files = (path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] not in but)
    return [
        f"{path.relative_to(PACKAGE)}:{number}: {match[0]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (match := pattern.search(line))
    ]


def test_the_core_package_names_no_host():
    assert lines_with(HOST_WORDS, "integrations", "cli.py", "doctor.py", "__init__.py") == []


def test_the_library_logs_to_one_logger():
    """A host that shows this logger shows all messages; axolotl hides INFO messages of every other logger."""
    assert lines_with(re.compile(r"getLogger\((?!\"llamafactory_hera\")"), "integrations") == []
