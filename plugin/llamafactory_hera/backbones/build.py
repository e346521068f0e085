"""Builds a LLaVA-style model from a language model and a vision encoder: ``llamafactory-hera build``."""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from .. import __version__
from ..files import write_json
from .processor import make_processor
from .sources import (
    EMBEDDING,
    HEAD,
    LANGUAGE_KEY,
    VISION_KEY,
    Source,
    one_line,
    open_language_model,
    open_vision_encoder,
    read_config,
)

GIB = 2**30
#: What was built from what; beside the weights.
PROVENANCE = "backbone.json"
_GENERATION_FILE = "generation_config.json"
# Embeddings are resized to a multiple of this, as the host does.
_VOCABULARY_MULTIPLE = 64


@dataclass(frozen=True)
class BuiltModel:
    """A built model.

    Attributes:
        folder: Its files.
        n_parameters: Of the whole model.
        image_token_id: Of ``<image>``.
        image_tokens: Tokens of an image.
        vocabulary: Rows of its embeddings.
        template: The host's template for stage 2, or None where none fits.
    """

    folder: Path
    n_parameters: int
    image_token_id: int
    image_tokens: int
    vocabulary: int
    template: str | None


def build_backbone(
    language_model: str,
    vision_model: str,
    output: str | Path,
    seed: int = 0,
    shard_gib: float = 4.0,
    report: Callable[[str], None] = lambda line: None,
) -> BuiltModel:
    """Makes a ``LlavaForConditionalGeneration`` of an LLM and a vision encoder, with a random projector.

    Weights are copied bit by bit and in their dtype, under the names of the llava-hf checkpoints, which every version
    of transformers reads (`save_pretrained` writes those of the installed one, and one dtype into the configuration).
    The whole model is in memory. It appears under its name when it is complete.

    Args:
        language_model: Folder or hub id of a causal LLM.
        vision_model: Folder or hub id of a CLIP, SigLIP, SigLIP2 (fixed resolution) or DINOv2 model.
        output: Folder to make.
        seed: Of the projector.
        shard_gib: Largest weight file, in GiB.
        report: Called with lines about the progress.

    Raises:
        ValueError: Names the option, its value and the remedy.
    """
    if not 0 < shard_gib < math.inf:
        raise ValueError(f"--shard-gib: {shard_gib} is not the size of a file; give a number above 0, such as 4.")
    output = _free_output(output)
    read_config(vision_model, VISION_KEY)  # before the language model's weights are fetched
    report(f"reading {language_model} and {vision_model}")
    language, vision = open_language_model(language_model), open_vision_encoder(vision_model)
    processor, size, template = make_processor(language, vision)
    config = _config(language, vision, processor, size)
    weights = _weights(language, vision, config, seed)
    n_parameters = _check(weights, config, language, vision)
    n_bytes = sum(tensor.nbytes for tensor in weights.values())
    with _appears_whole(output, n_bytes) as folder:
        report(f"writing {_gib(n_bytes)} to {output}")
        processor.save_pretrained(folder)
        notes = {"language_model": language_model, "vision_model": vision_model, "seed": seed, "template": template}
        write_json(folder / PROVENANCE, notes | {"llamafactory-hera": __version__})
        if (language.folder / _GENERATION_FILE).is_file():
            shutil.copyfile(language.folder / _GENERATION_FILE, folder / _GENERATION_FILE)
        save_torch_state_dict(weights, folder, max_shard_size=int(shard_gib * GIB))
        config.save_pretrained(folder)
    return BuiltModel(
        folder=output,
        n_parameters=n_parameters,
        image_token_id=config.image_token_id,
        image_tokens=config.image_seq_length,
        vocabulary=config.text_config.vocab_size,
        template=template,
    )


def padded_vocabulary(rows: int, tokens: int) -> int:
    """Rows of an embedding of ``rows`` once it must hold ``tokens`` entries."""
    return rows if tokens <= rows else -(-tokens // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def _config(language: Source, vision: Source, processor: Any, size: tuple[int, int]) -> Any:
    import transformers

    llava: Any = transformers.LlavaConfig
    text, patch = language.config, vision.config.patch_size
    pad = text.pad_token_id if text.pad_token_id is not None else processor.tokenizer.pad_token_id
    return llava(
        text_config=text.to_dict() | {"vocab_size": padded_vocabulary(text.vocab_size, len(processor.tokenizer))},
        vision_config=vision.config.to_dict(),
        image_token_index=processor.image_token_id,
        image_seq_length=(size[0] // patch) * (size[1] // patch),
        vision_feature_layer=-1,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=bool(text.tie_word_embeddings),
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=pad,
        dtype=language.weights[EMBEDDING].dtype,
        architectures=["LlavaForConditionalGeneration"],
    )


def _weights(language: Source, vision: Source, config: Any, seed: int) -> dict[str, Tensor]:
    """Every tensor of the model under its stored name."""
    weights = dict(language.weights)
    added = config.text_config.vocab_size - language.config.vocab_size
    for name in (EMBEDDING, HEAD) if added else ():
        if name in weights:
            # the mean, so that a new token is as likely and as large as an average one
            mean = weights[name].mean(dim=0, dtype=torch.float32).to(weights[name].dtype)
            weights[name] = torch.cat([weights[name], mean.expand(added, -1)])
    dtype = language.weights[EMBEDDING].dtype
    return weights | vision.weights | _projector(vision.config.hidden_size, language.config.hidden_size, dtype, seed)


def _projector(width: int, hidden: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Two linear layers with PyTorch's default initialisation, as LLaVA-1.5 begins; a generator for each tensor."""
    projector: dict[str, Tensor] = {}
    for layer, inputs in ((1, width), (2, hidden)):
        for kind, shape in (("weight", (hidden, inputs)), ("bias", (hidden,))):
            generator = torch.Generator().manual_seed(4 * seed + len(projector))
            drawn = torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
            projector[f"multi_modal_projector.linear_{layer}.{kind}"] = drawn.to(dtype)
    return projector


def _check(weights: dict[str, Tensor], config: Any, language: Source, vision: Source) -> int:
    """Has transformers load the weights on the meta device, which takes no memory; returns the number of parameters.

    Raises:
        ValueError: No model can be made of the configuration, or a tensor is missing, left over, or of another shape.
    """
    import transformers

    llava: Any = transformers.LlavaForConditionalGeneration
    try:
        model, found = llava.from_pretrained(
            None,
            config=config,
            state_dict={name: tensor.to("meta") for name, tensor in weights.items()},
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # each model class has its own checks and errors
        raise ValueError(
            f"{LANGUAGE_KEY}, {VISION_KEY}: no model can be made of config.json in {language.folder} and in "
            f"{vision.folder} ({one_line(error)}). Correct the value, or copy or download them again, whole."
        ) from error
    wrong = dict.fromkeys(found["missing_keys"], "missing, config.json asks for it")
    wrong |= dict.fromkeys(found["unexpected_keys"], "left over, config.json asks for no such tensor")
    for name, stored, asked in found["mismatched_keys"]:
        wrong[name] = f"{tuple(stored)}, config.json asks for {tuple(asked)}"
    if wrong:
        name = min(wrong)
        key, source = (VISION_KEY, vision) if "vision_tower" in name else (LANGUAGE_KEY, language)
        raise ValueError(
            f"{key}: configuration and weights of {source.folder} do not belong together in {len(wrong)} tensors. "
            f"The first: {name} is {wrong[name]}. Download it again, whole."
        )
    return sum(parameter.numel() for parameter in model.parameters())


def _free_output(output: str | Path) -> Path:
    """The folder to make; a link is followed, so that it points to the model afterwards."""
    try:
        folder = Path(output).absolute().resolve()
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            what = "not empty" if folder.is_dir() else "a file"
            raise ValueError(f"--output: {folder} is {what}; give another folder, or remove it yourself.")
        if _partial(folder).exists():
            raise ValueError(
                f"--output: {_partial(folder)} is there, of a build that was killed or still runs; remove it "
                "when none runs, or give another --output."
            )
        parent = _nearest(folder.parent)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            why = "cannot be written" if parent.is_dir() else "is a file"
            raise ValueError(f"--output: {folder} cannot be made, {parent} {why}; give another folder.")
    except (OSError, RuntimeError) as error:  # a link that leads to itself is a RuntimeError before Python 3.13
        raise ValueError(f"--output: {output} cannot be used ({error}); give another folder.") from error
    return folder


@contextmanager
def _appears_whole(output: Path, n_bytes: int) -> Iterator[Path]:
    """Gives ``OUTPUT.partial`` to write to; it takes its final name at the end, or goes when writing fails."""
    free = shutil.disk_usage(_nearest(output.parent)).free
    if free < n_bytes:
        raise ValueError(
            f"--output: {_gib(n_bytes)} are needed for {output}, {_gib(free)} are free; make room and run the same "
            "command again, or give a folder on another disk."
        )
    partial = _partial(output)
    try:
        partial.mkdir(parents=True)
        try:
            yield partial
            os.replace(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except Exception as error:  # of a full disk each library that writes makes an exception of its own
        raise ValueError(
            f"--output: {output} cannot be written ({one_line(error)}). Make room, or give another folder."
        ) from error


def _partial(output: Path) -> Path:
    """Where a model is written before it is complete."""
    return output.with_name(f"{output.name}.partial")


def _nearest(path: Path) -> Path:
    """The path itself, or the first above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:.3g} GiB"
