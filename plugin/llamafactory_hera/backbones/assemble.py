"""Builds a LLaVA-style model from a language model and a vision encoder: ``llamafactory-hera build``."""

import hashlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..teachers.hub import teacher_folder
from .chat import chat_template, host_template
from .entries import padded_vocabulary
from .images import open_image_processor
from .language import LanguageSource, open_language_model
from .plan import PlannedTensor, plan_tensors
from .sources import language_model_folder, one_line, read_config
from .tokenizer import IMAGE_TOKEN, add_image_token, open_tokenizer
from .vision import VisionSource, open_vision
from .work_folder import WorkFolder
from .writer import write_json, write_shards

GIB = 2**30
#: What was built from what; beside the weights.
PROVENANCE = "backbone.json"
GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class Backbone:
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
) -> Backbone:
    """Makes a ``LlavaForConditionalGeneration`` of an LLM and a vision encoder, with a random projector.

    Weights are copied bit by bit and in their dtype, one shard in memory at a time. The model is written to
    ``OUTPUT.partial`` and renamed when it is complete; the same call continues an interrupted one.

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
        raise ValueError(f"--shard-gib: {shard_gib} is no size of a file; give a number above 0, such as 4.")
    work = WorkFolder(output)
    read_config(teacher_folder(vision_model, "--vision-model", weights=False), "--vision-model")
    language = open_language_model(language_model_folder(language_model, "--language-model"))
    vision = open_vision(teacher_folder(vision_model, "--vision-model"))
    image_processor, size = open_image_processor(vision)
    processor, template = _processor(language, vision, image_processor)
    config = _config(language, vision, processor, size)
    planned = plan_tensors(language, vision, config, seed)
    backbone = Backbone(
        folder=work.output,
        n_parameters=sum(math.prod(tensor.shape) for tensor in planned),
        image_token_id=config.image_token_id,
        image_tokens=config.image_seq_length,
        vocabulary=config.text_config.vocab_size,
        template=template,
    )
    notes = {"language_model": language_model, "vision_model": vision_model, "seed": seed, "template": template}
    request = _digest(planned, shard_gib)
    try:
        if not work.is_finished(request):
            work.start(planned, request)
            _save_processor(processor, work.partial)
            write_json(work.partial / PROVENANCE, notes | {"llamafactory-hera": __version__})
            if (language.folder / GENERATION_FILE).is_file():
                shutil.copyfile(language.folder / GENERATION_FILE, work.partial / GENERATION_FILE)
            write_shards(planned, work.partial, int(shard_gib * GIB), report)
            config.save_pretrained(work.partial)  # last: without it nothing loads the folder
        work.finish()
    except OSError as error:
        raise work.failure(error) from error
    return backbone


def _processor(language: LanguageSource, vision: VisionSource, image_processor: Any) -> tuple[Any, str | None]:
    """The model's processor, and the host's template that fits it."""
    from transformers import LlavaProcessor

    tokenizer = open_tokenizer(language)
    add_image_token(tokenizer)
    template = host_template(language.config.model_type, tokenizer)
    tokenizer.chat_template = chat_template(tokenizer, template)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy=vision.select_strategy,
        num_additional_image_tokens=vision.additional_tokens,
        image_token=IMAGE_TOKEN,
        chat_template=tokenizer.chat_template,
    )
    return processor, template


def _save_processor(processor: Any, folder: Path) -> None:
    try:
        processor.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # of a full disk the tokenizers library makes an exception without a type
        raise OSError(one_line(error)) from error


def _config(language: LanguageSource, vision: VisionSource, processor: Any, size: tuple[int, int]) -> Any:
    from transformers import LlavaConfig

    text, patch = language.config, vision.config.patch_size
    pad = text.pad_token_id if text.pad_token_id is not None else processor.tokenizer.pad_token_id
    return LlavaConfig(
        text_config=text.to_dict() | {"vocab_size": padded_vocabulary(text.vocab_size, len(processor.tokenizer))},
        vision_config=vision.config.to_dict(),
        image_token_index=processor.image_token_id,
        image_seq_length=(size[0] // patch) * (size[1] // patch),
        vision_feature_layer=-1,
        vision_feature_select_strategy=vision.select_strategy,
        projector_hidden_act="gelu",
        tie_word_embeddings=language.tied,
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=pad,
        dtype=language.dtype,
        architectures=["LlavaForConditionalGeneration"],
    )


def _digest(planned: list[PlannedTensor], shard_gib: float) -> str:
    """What the weights are made of and how they are cut."""
    digest = hashlib.sha256(repr(shard_gib).encode())
    for tensor in planned:
        digest.update(repr((tensor.name, tensor.shape, str(tensor.dtype), tensor.source)).encode())
    return digest.hexdigest()
