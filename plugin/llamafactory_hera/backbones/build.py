"""The assembly of a LLaVA-style model, with its processor, from a language model and a vision encoder."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

import torch
import yaml
from huggingface_hub import save_torch_state_dict
from PIL import Image
from safetensors import SafetensorError
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
)

from ..files import BUILT, read_json, write_json
from ..heads.paper import without_folder
from .sources import EMBEDDING, HEAD, TOWERS, Source, language_weights, open_language, open_vision, vision_weights

_IMAGE_TOKEN = "<image>"
_QUESTION, _ANSWER = "What is shown in this image? A red car, 2 people.", "An answer."
_CHAT = yaml.safe_load(Path(__file__).with_name("chat_templates.yaml").read_bytes())


class BuiltModel(NamedTuple):
    """A finished model on disk."""

    folder: Path
    n_parameters: int
    image_token_id: int  #: The id of the token ``<image>``.
    image_tokens: int  #: The number of tokens per image.
    template: str | None  #: The training template of stage 2; None if no template fits the language model.


def build_backbone(
    language_model: str,  # folder or hub id of a causal LLM
    vision_model: str,  # folder or hub id of a CLIP, SigLIP, SigLIP2 (fixed resolution) or DINOv2 model
    output: str | Path,
    seed: int = 0,
    image_aspect_ratio: Literal["square", "pad"] = "square",
) -> BuiltModel:
    """Assembles a ``LlavaForConditionalGeneration`` with a random projector in a new or empty folder.

    The weights are copied bit for bit in their stored dtype, under the names of llava-hf checkpoints. ``square`` keeps
    the encoder's image processor. As in LLaVA, ``pad`` pads images to squares with the mean color of that processor.
    """
    output = Path(output).expanduser().resolve()
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise ValueError(f"--output: {output} is not an empty folder; give another folder.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{output.name}.", suffix=".partial", dir=output.parent) as temporary:
        language, vision = open_language(language_model), open_vision(vision_model)
        processor, n_tokens, template = _make_processor(language, vision, image_aspect_ratio == "pad")
        weights = language_weights(language)
        dtype, rows = weights[EMBEDDING].dtype, padded_vocabulary(language.config.vocab_size, len(processor.tokenizer))
        _add_rows(weights, rows - language.config.vocab_size)
        weights |= vision_weights(vision)
        weights |= _projector(vision.config.hidden_size, language.config.hidden_size, dtype, seed)
        config = _config(language.config, vision.config, processor, n_tokens, rows, dtype)
        setattr(config, BUILT, without_folder(language_model))
        _check(weights, config)
        folder = Path(temporary) / "model"  # `temporary` itself is not readable by other users
        folder.mkdir()
        try:
            save_torch_state_dict(weights, folder)
        except SafetensorError as error:
            raise OSError(f"--output: {output} cannot be written ({error}).") from error
        config.save_pretrained(folder)
        processor.save_pretrained(folder)
        write_json(folder / "generation_config.json", _generation(language, config, processor.tokenizer))
        folder.replace(output)
    n_parameters = sum(tensor.numel() for tensor in weights.values())
    return BuiltModel(output, n_parameters, processor.image_token_id, n_tokens, template)


def padded_vocabulary(rows: int, tokens: int) -> int:
    """Returns ``rows`` if they suffice for all tokens, otherwise ``tokens`` rounded up to a multiple of 64."""
    return rows if tokens <= rows else -(-tokens // 64) * 64


def _config(text: Any, tower: Any, processor: Any, n_tokens: int, rows: int, dtype: torch.dtype) -> LlavaConfig:
    values = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if values["pad_token_id"] is None:
        values["pad_token_id"] = processor.tokenizer.pad_token_id
    values |= {"text_config": text.to_dict() | {"vocab_size": rows}, "vision_config": tower.to_dict(), "dtype": dtype}
    values |= {"image_token_index": processor.image_token_id, "image_seq_length": n_tokens}
    values |= {"vision_feature_select_strategy": processor.vision_feature_select_strategy, "vision_feature_layer": -1}
    values |= {"tie_word_embeddings": text.tie_word_embeddings, "architectures": ["LlavaForConditionalGeneration"]}
    return LlavaConfig(**values)


def _generation(language: Source, config: Any, tokenizer: Any) -> dict[str, Any]:
    """Copies the generation settings, and adds the end-of-turn token, which base models lack, to the end tokens."""
    settings = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if (file := language.folder / "generation_config.json").is_file():
        settings |= read_json(file)
    ends = settings["eos_token_id"]
    ends = [*(ends if isinstance(ends, list) else [ends]), _chat_end(tokenizer)]
    return settings | {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None)) or None}


def _add_rows(weights: dict[str, Tensor], n_rows: int) -> None:
    """Appends rows to the embedding and the output layer, in place."""
    for name in (EMBEDDING, HEAD) if n_rows else ():
        if name in weights:
            # With the mean of all rows, a new token has the average logit instead of a random one.
            mean = weights[name].mean(dim=0, dtype=torch.float32).to(weights[name].dtype)
            weights[name] = torch.cat([weights[name], mean.expand(n_rows, -1)])


def _projector(width: int, hidden: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Draws the two linear layers of LLaVA-1.5's projector from PyTorch's default initialization."""
    projector: dict[str, Tensor] = {}
    for layer, inputs in ((1, width), (2, hidden)):
        for kind, shape in (("weight", (hidden, inputs)), ("bias", (hidden,))):
            # A generator per tensor makes each tensor independent of the shapes of the others.
            generator = torch.Generator().manual_seed((4 * seed + len(projector)) % 2**64)
            drawn = torch.empty(shape).uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
            projector[f"multi_modal_projector.linear_{layer}.{kind}"] = drawn.to(dtype)
    return projector


def _check(weights: dict[str, Tensor], config: LlavaConfig) -> None:
    """Refuses tensors that do not match the configuration; transformers would warn and initialize them at random."""
    model_class: Any = LlavaForConditionalGeneration
    values = {name: tensor.to("meta") for name, tensor in weights.items()}
    options = {"device_map": "meta", "ignore_mismatched_sizes": True, "output_loading_info": True}
    _, info = model_class.from_pretrained(None, config=config, state_dict=values, **options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found := sorted(map(str, info[problem])):
            key = "--vision-model" if "vision_tower" in found[0] else "--language-model"
            first = f"{problem}: {found[0]}, {len(found)} in total"
            raise ValueError(f"{key}: the weights do not match config.json ({first}); download the checkpoint again.")


# -- the processor ----------------------------------------------------------------------------------------------------


def _make_processor(language: Source, vision: Source, pad: bool) -> tuple[Any, int, str | None]:
    """Returns the processor of a built model, the number of tokens of one image, and the training template, if any."""
    image_processor: Any = AutoImageProcessor.from_pretrained(vision.folder)
    if pad:
        # LLaVA's image processor crops by default. SigLIP's settings do not mention cropping.
        settings = {"do_center_crop": False} | image_processor.to_dict() | {"do_pad": True}
        image_processor = LlavaImageProcessor.from_dict(settings)
    # The processor determines the size: DINOv2's processor uses a size that differs from the model's configuration.
    height, width = image_processor(Image.new("RGB", (64, 48)), return_tensors="pt")["pixel_values"].shape[-2:]

    tokenizer: Any = AutoTokenizer.from_pretrained(language.folder)
    # transformers opens a folder without tokenizer files as an empty tokenizer.
    ids = set(tokenizer(_QUESTION, add_special_tokens=False)["input_ids"]) - {tokenizer.unk_token_id}
    if not ids or max(ids) >= language.config.vocab_size:
        remedy = "copy this model's tokenizer.json and tokenizer_config.json into it."
        raise ValueError(f"{language.key}: {language.name} has no tokenizer, or another model's; {remedy}")
    # A tokenizer that already has the token keeps its id.
    tokenizer.add_tokens([AddedToken(_IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    smollm = "llava_smollm2" if "named SmolLM" in (tokenizer.chat_template or "") else None
    vicuna = "llava_vicuna" if tokenizer.chat_template is None else smollm
    llama = "llava_llama3" if "<|eot_id|>" in tokenizer.get_vocab() else vicuna
    templates = {"qwen2": "llava_qwen2_5", "qwen3": "llava_qwen3", "llama": llama}
    template = templates.get(language.config.model_type)
    tokenizer.chat_template = _chat_template(tokenizer, template)
    if "bos_token" in (tokenizer.chat_template or ""):
        tokenizer.add_bos_token = False  # the chat template adds it

    has_cls, patch = TOWERS[vision.config.model_type].has_cls, vision.config.patch_size
    layout = {"patch_size": patch, "num_additional_image_tokens": int(has_cls)}
    layout |= {"vision_feature_select_strategy": "default" if has_cls else "full"}
    processor = LlavaProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template, **layout)
    return processor, (height // patch) * (width // patch), template


def _chat_end(tokenizer: Any) -> int | None:
    """Returns the special token that follows an answer in the chat template, or None."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    rest = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_ANSWER)[2]
    end = next(iter(tokenizer.encode(rest, add_special_tokens=False)), None)
    return end if end in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[end].special else None


def _chat_template(tokenizer: Any, template: str | None) -> str | None:
    """Returns the language model's chat template, else the training template's; for hybrid Qwen3, plain ChatML."""
    chat = tokenizer.chat_template or _CHAT.get(template)
    if template == "llava_qwen3" and "enable_thinking" in (chat or ""):
        chat = _CHAT["chatml"]
    if chat == _CHAT["llava_vicuna"]:
        bos = tokenizer.bos_token
        alone, after_bos = (tokenizer.encode(text, add_special_tokens=False) for text in ("A", f"{bos}A"))
        if bos is not None and after_bos[1:] != alone:
            # Training encodes the text after BOS separately, and SentencePiece then puts a space before it. Most
            # tokenizers put no space there if BOS is part of the text.
            chat = chat.replace("{{- bos_token -}}", "{{- bos_token -}}{{- ' ' -}}")
    return None if chat is None else _CHAT["flatten"] + chat
