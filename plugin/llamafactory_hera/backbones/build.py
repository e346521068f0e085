"""Builds a LLaVA-style model from a language model and a vision encoder: ``llamafactory-hera build``."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from .. import __version__
from ..files import read_json, write_json
from .processor import chat_end, make_processor
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
# Embeddings are resized to a multiple of this, as the host does.
_VOCABULARY_MULTIPLE = 64
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class BuiltModel:
    """A built model."""

    folder: Path
    n_parameters: int
    image_token_id: int  # of ``<image>``
    image_tokens: int  # of an image
    vocabulary: int  # rows of its embeddings
    template: str | None  # the host's for stage 2, or None where none fits


def build_backbone(
    language_model: str,
    vision_model: str,
    output: str | Path,
    seed: int = 0,
    shard_gib: float = 4.0,
    image_aspect_ratio: Literal["square", "pad"] = "square",
) -> BuiltModel:
    """Makes a ``LlavaForConditionalGeneration`` of an LLM and a vision encoder, with a random projector.

    Weights are copied bit by bit and in their dtype, under the names of the llava-hf checkpoints, which every version
    of transformers reads. The whole model is in memory. It appears under its name when it is complete.

    Args:
        language_model: Folder or hub id of a causal LLM.
        vision_model: Folder or hub id of a CLIP, SigLIP, SigLIP2 (fixed resolution) or DINOv2 model.
        output: Folder to make.
        seed: Of the projector.
        shard_gib: Largest weight file, in GiB.
        image_aspect_ratio: What the model's processor does to images, in LLaVA's words: ``pad`` makes squares of them
            with the processor's mean color first, ``square`` leaves all to the vision encoder's own processor.

    Raises:
        ValueError: Names the option, its value and the remedy.
    """
    if not 0 < shard_gib < math.inf:
        raise ValueError(f"--shard-gib: {shard_gib} is not the size of a file; give a number above 0, such as 4.")
    with _partial_folder(output) as (output, partial):
        read_config(vision_model, VISION_KEY)  # before the language model's weights are fetched
        language, vision = open_language_model(language_model), open_vision_encoder(vision_model)
        processor, size, template = make_processor(language, vision, image_aspect_ratio == "pad")
        config = _config(language, vision, processor, size)
        weights = _weights(language, vision, config, seed)
        n_parameters = _check(weights, config, language, vision)
        n_bytes, free = sum(tensor.nbytes for tensor in weights.values()), shutil.disk_usage(partial).free
        if free < n_bytes:
            raise ValueError(
                f"--output: {n_bytes / GIB:.3g} GiB are needed for {output}, {free / GIB:.3g} GiB are free; make room "
                "and run the same command again, or give a folder on another disk."
            )
        notes = {"language_model": language_model, "vision_model": vision_model, "seed": seed, "template": template}
        notes |= {"image_aspect_ratio": image_aspect_ratio}
        generation = _generation(language, config, processor.tokenizer)
        try:
            processor.save_pretrained(partial)
            write_json(partial / PROVENANCE, notes | {"llamafactory-hera": __version__})
            write_json(partial / _GENERATION, generation)
            save_torch_state_dict(weights, partial, max_shard_size=int(shard_gib * GIB))
            config.save_pretrained(partial)
            os.replace(partial, output)
        except Exception as error:  # of a full disk each library that writes makes an exception of its own
            raise ValueError(
                f"--output: {output} cannot be written ({one_line(error)}). Make room, or give another folder."
            ) from error
    vocabulary = config.text_config.vocab_size
    return BuiltModel(output, n_parameters, config.image_token_id, config.image_seq_length, vocabulary, template)


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


def _generation(language: Source, config: Any, tokenizer: Any) -> dict[str, Any]:
    """The language model's generation settings, with the chat template's last token as one more end (base models')."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    settings = {name: getattr(config, name) for name in names}
    if (file := language.folder / _GENERATION).is_file():
        try:
            settings |= read_json(file)
        except (ValueError, TypeError) as error:  # not an object
            raise ValueError(
                f"{LANGUAGE_KEY}: {one_line(error)}. Copy {file} of the same model again, whole, or remove it."
            ) from error
    ends = settings["eos_token_id"]
    ends = [*(ends if isinstance(ends, list) else [ends]), chat_end(tokenizer)]
    return settings | {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)) or None}


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
    """Two linear layers with PyTorch's default initialization, as LLaVA-1.5 begins; a generator for each tensor."""
    projector: dict[str, Tensor] = {}
    for layer, inputs in ((1, width), (2, hidden)):
        for kind, shape in (("weight", (hidden, inputs)), ("bias", (hidden,))):
            generator = torch.Generator().manual_seed(4 * seed + len(projector))
            drawn = torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
            projector[f"multi_modal_projector.linear_{layer}.{kind}"] = drawn.to(dtype)
    return projector


def _check(weights: dict[str, Tensor], config: Any, language: Source, vision: Source) -> int:
    """Has transformers load the weights on the meta device; returns the number of parameters.

    Refuses what makes no model, and a tensor that is missing, left over, or of another shape.
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


@contextmanager
def _partial_folder(output: str | Path) -> Iterator[tuple[Path, Path]]:
    """Gives the folder to make, links followed, and ``OUTPUT.partial`` to make it in, which goes when that fails."""
    with ExitStack() as stack:
        try:
            folder = Path(output).absolute().resolve()
            if folder.exists() and any(folder.iterdir()):
                raise ValueError(f"--output: {folder} is not empty; give another folder, or remove it yourself.")
            partial = folder.with_name(f"{folder.name}.partial")
            if partial.exists():
                raise ValueError(
                    f"--output: {partial} is there, of a build that was killed; remove it, or give another --output."
                )
            partial.mkdir(parents=True)
        except (OSError, RuntimeError) as error:  # a link that leads to itself is a RuntimeError before Python 3.13
            raise ValueError(f"--output: {output} cannot be used ({error}); give another folder.") from error
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        yield folder, partial
