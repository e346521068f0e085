"""The checks of ``llamafactory-hera doctor RECIPE.yaml``. They load no weights and download nothing.

They do not import LLaMA-Factory either, because the import alone takes longer than all checks together.
"""

import json
import re
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForImageTextToText

from llamafactory_hera.backbones.table import LANGUAGE_MODELS
from llamafactory_hera.config import HeraConfig
from llamafactory_hera.files import read_json
from llamafactory_hera.heads.families import head_layout, media_token_ids
from llamafactory_hera.heads.targets import AUTO, Targets, hub_id
from llamafactory_hera.hub import local_folder, weight_files
from llamafactory_hera.integrations.messages import describe_candidates, translated
from llamafactory_hera.objectives import TokenObjective
from llamafactory_hera.selection.run_yaml import RecipeFile
from llamafactory_hera.teachers.encoder import VisionTeacher
from llamafactory_hera.teachers.images import load_image

from . import PATCHES, refuse_data_uri, require_host

_N_IMAGES = 8  # images that are opened in each dataset
_NOT_TEXT = ("projector", "merger", "vision", "visual")  # in names of parameters that the host freezes by default


def check_recipe(path: str, overrides: Sequence[str] = (), processes: int = 1) -> int:
    """Prints the result of each check of a recipe; returns 1 if one found a problem, otherwise 0."""
    recipe, problems = _Recipe(path, overrides, processes), []
    for name in ("host", "keys", "batch", "heads", "template", "teacher", "images", "memory"):
        try:
            print(f"ok  {name:<8}  {getattr(recipe, name)()}", flush=True)
        except (ValueError, OSError) as error:
            problem = re.sub("^model: ", "model_name_or_path: ", " ".join(str(error).split()))
            if problem not in problems:  # several checks may find the same problem
                print(f"problem: {problem}", flush=True)
                problems.append(problem)
    print(f"\n{len(problems)} problem(s) found." if problems else "\nNo problem found.")
    return int(bool(problems))


class _Recipe:
    """A recipe of the host. Each check returns the text of its line, or raises ``ValueError`` with a remedy."""

    def __init__(self, path: str, overrides: Sequence[str], processes: int) -> None:
        changed = {key: yaml.safe_load(value) for key, _, value in (each.partition("=") for each in overrides)}
        values = yaml.safe_load(RecipeFile.read(path).with_keys(changed))
        self.get, self.processes = values.get, processes
        self.hera = {key: value for key, value in values.items() if key.startswith(HeraConfig.PREFIX)}

    @cached_property
    def config(self) -> HeraConfig:
        return HeraConfig.from_keys(self.hera)

    @cached_property
    def folder(self) -> Path:
        return _local(str(self.get("model_name_or_path")), "model_name_or_path")

    @cached_property
    def model(self) -> Any:
        config = AutoConfig.from_pretrained(self.folder)
        if getattr(config, "vision_config", None) is None:
            raise ValueError(f"model_name_or_path: {self.folder} is a text-only model; give a multimodal model.")
        return config

    def host(self) -> str:
        require_host()
        return f"llamafactory {version('llamafactory')}, {PATCHES}"

    def keys(self) -> str:
        with warnings.catch_warnings(record=True) as caught:
            text = f"{len(self.hera)} hera_* keys, objective {self.config.objective}"
        if self.get("stage") != "hera":
            raise ValueError(f"stage: {self.get('stage')} trains without HeRA; doctor checks only stage: hera.")
        return "; ".join([text, *(str(each.message) for each in caught)])

    def batch(self) -> str:
        config, k = self.config, self.config.k
        size, steps = self.get("per_device_train_batch_size", 8), self.get("gradient_accumulation_steps", 1)
        packed = bool(self.get("neat_packing"))
        compared = config.check_batch(size, steps, self.processes, packed)
        remembered = max(0, 4 * k - compared + 1) if config.remembered is None else config.remembered
        described = describe_candidates(k, compared, remembered, packed)
        neighbors = f", neighbors: {described}" if config.reads("hera_k") else ""
        return f"{compared} {'packed rows' if packed else 'samples'} compared at once{neighbors}"

    def heads(self) -> str:
        config, layout = self.config, head_layout(self.model)
        n_heads = sum(layer.n_heads for layer in layout.layers)
        if config.granularity == "head" and config.named_targets == AUTO and config.select_m > n_heads:
            raise ValueError(f"hera_select_m: {config.select_m} is more than the {n_heads} heads; lower it.")
        chosen = f"auto selects {config.select_m}"
        if hub_id(config.named_targets, config.targets_key) is not None:
            chosen = f"the run downloads {config.named_targets} and checks that it is for this model"
        elif config.named_targets != AUTO:
            chosen = str(Targets.parse(config.named_targets, config.granularity, self.model))
        return f"{chosen}; {self.model.model_type} has {layout.n_layers} layers with up to {layout.n_heads} heads each"

    def template(self) -> str:
        name, tokens, file = self.get("template"), _image_tokens(), self.folder / "tokenizer.json"
        added = read_json(file)["added_tokens"] if file.is_file() else []
        expected = {token["content"] for token in added if token["id"] in media_token_ids(self.model)}
        fitting = [str(other) for other, token in tokens.items() if token in expected]
        if tokens.get(name) is None or (fitting and name not in fitting):
            choice = f"for this model: {', '.join(fitting[:8])}" if fitting else "that the model's authors use"
            has = f"writes an image as {tokens[name]}" if tokens.get(name) else "has no images"
            raise ValueError(f"template: {name} {has}; choose one {choice}.")
        return f"{name} writes an image as {tokens[name]}"

    def teacher(self) -> str:
        folder = _local(self.config.teacher, "hera_teacher")
        if not issubclass(self.config.objective_class(), TokenObjective):
            VisionTeacher.check(str(folder))
        return f"{self.config.teacher} in {folder}"

    def images(self) -> str:
        folder, named, notes = Path(self.get("dataset_dir", "data")), self.get("dataset") or "", []
        n_opened, n_unknown = 0, 0
        media = self.get("media_dir") or folder
        known = read_json(folder / "dataset_info.json")
        for name in named.replace(" ", "").split(",") if isinstance(named, str) else named:
            if name not in known:
                raise ValueError(f"dataset: {name} is not in {folder}/dataset_info.json; add it.")
            file, column = folder / known[name].get("file_name", ""), known[name].get("columns", {}).get("images")
            if column is None or file.suffix not in (".json", ".jsonl"):
                notes.append(f"{name} has {'no images' if column is None else 'no JSON file, so it was not opened'}")
                n_unknown += column is not None
                continue
            found = (row.get(column) or [] for row in _first_rows(file))
            listed = ([images] if isinstance(images, str) else images for images in found)
            images = list(islice(chain.from_iterable(listed), _N_IMAGES))
            n_opened += len(images)
            with translated(f"media_dir: {media}: {name}: {{}}".format):
                for image in images:
                    refuse_data_uri(image, "a row")
                    inside = Path(media, image) if isinstance(image, str) else None
                    load_image(inside if inside and inside.is_file() else image)
            notes.append(f"opened the first {len(images)} images of {name}")
        if not n_opened and not n_unknown:
            raise ValueError(f"dataset: {named} has no images, but HeRA compares images; add a dataset with images.")
        return "; ".join(notes)

    def memory(self) -> str:
        with torch.device("meta"):
            parameters = dict(AutoModelForImageTextToText.from_config(self.model).named_parameters())
        half = self.get("bf16") or self.get("fp16") or self.get("pure_bf16")
        sizes = dict.fromkeys(("weights", "gradients and AdamW", "teacher"), 0.0)
        for name, value in parameters.items():
            text, trained = not any(part in name for part in _NOT_TEXT), 0
            linear = text and name.endswith("proj.weight")  # gets an adapter, and may be quantized
            if self.get("finetuning_type") == "full":
                trained = value.numel() if text and not self.get("freeze_language_model") else 0
            elif linear:
                trained = self.get("lora_rank", 8) * sum(value.shape)
            bits = (linear and self.get("quantization_bit")) or (16 if half else 32)
            sizes["weights"] += 4 * trained + (value.numel() * bits / 8 if trained != value.numel() else 0)
            sizes["gradients and AdamW"] += 12 * trained  # the gradient and two moments in fp32
        files = weight_files(_local(self.config.teacher, "hera_teacher"))
        sizes["teacher"] = sum(file.stat().st_size for file in files)
        listed = " + ".join(f"{size / 2**30:.2f} {name}" for name, size in sizes.items())
        return f"estimated: {sum(sizes.values()) / 2**30:.2f} GiB = {listed}, before sharding and without activations"


def _local(name: str, key: str) -> Path:
    """Returns the local folder of a model, possibly in the hub's cache, or raises ``ValueError``."""
    return local_folder(name, key, f"a folder, or run hf download {name} while online", local_files_only=True)


def _first_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Reads rows from the first mebibyte of a JSON or JSON Lines file, because the file may be large."""
    with file.open(encoding="utf-8-sig") as opened:
        text, decoder = opened.read(1 << 20).lstrip("[ \r\n\t"), json.JSONDecoder()
    while text.startswith("{"):
        try:
            row, end = decoder.raw_decode(text)
        except ValueError:  # the last row is cut off
            return
        yield row
        text = text[end:].lstrip(", \r\n\t")


def _image_tokens() -> dict[str | None, str | None]:
    """Maps each template to its image token or None; reads the host's source, because importing the host is slow."""
    built = ("llava_plain", *(model.template for model in LANGUAGE_MODELS.values()))
    tokens: dict[str | None, str | None] = dict.fromkeys(built, "<image>")
    require_host(patches=False)
    (host,) = find_spec("llamafactory").submodule_search_locations  # type: ignore[union-attr, misc]
    source = Path(host, "data", "template.py").read_text(encoding="utf-8")
    for call in re.findall(r"^register_template\((.*?)^\)", source, re.DOTALL | re.MULTILINE):
        name, image = (re.search(rf'\b{key}="(.+?)"', call) for key in ("name", "image_token"))
        tokens[name and name[1]] = image and image[1]
    return tokens
