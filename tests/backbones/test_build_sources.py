"""`build` looks at what it is given before it makes anything: each fault names its option, value and remedy."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from .conftest import Build
from .test_build import PROMPT, load, stored
from .tiny import new_tokenizer, save_language_model

Refused = Callable[..., str]


@pytest.fixture
def refused(build: Build, tmp_path: Path) -> Refused:
    """Builds what must be refused with a message that matches; returns the message."""

    def run(match: str, **options) -> str:
        with pytest.raises(ValueError, match=match) as caught:
            build(**options)
        assert not list(tmp_path.glob("built*"))
        message = str(caught.value)
        assert message.startswith("--")
        assert "\n" not in message
        return message

    return run


@pytest.fixture
def llm(checkpoints: dict, tmp_path: Path) -> Path:
    """A copy of a language model, to damage."""
    return shutil.copytree(checkpoints["qwen3"], tmp_path / "llm")


@pytest.fixture
def tower(checkpoints: dict, tmp_path: Path) -> Path:
    """A copy of a vision encoder, to damage."""
    return shutil.copytree(checkpoints["clip"], tmp_path / "tower")


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# which model


def test_another_kind_of_model_is_refused_with_what_can_be_given(
    refused: Refused, build: Build, tmp_path: Path
) -> None:
    tf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16).save_pretrained(tmp_path / "gpt2")
    for llm, kind in (("siglip", "siglip"), (build(output="finished").folder, "llava"), (tmp_path / "gpt2", "gpt2")):
        message = refused(
            rf"--language-model: .* \({kind}\) is not a language model alone .* types: .*gemma2, ", llm=llm
        )
        assert "added to FAMILIES in heads/families.py; a multimodal model is trained as it is" in message
    for config in (tf.Gemma2Config(), tf.GraniteConfig(logits_scaling=8.0), tf.Cohere2Config()):
        config.save_pretrained(tmp_path / "scaled")
        refused(
            rf"--language-model: .* \({config.model_type}\) has (final_)?logit.* behind its lm_head",
            llm=tmp_path / "scaled",
        )
    tower = r"cannot be the vision tower; give one of these types: clip, .* not SigLIP2 NaFlex"
    refused(rf"--vision-model: .* \(qwen3\) {tower}", tower="qwen3")
    for config in (tf.Siglip2Config(), tf.Dinov2WithRegistersConfig(), tf.ResNetConfig()):
        config.save_pretrained(tmp_path / "other")
        refused(rf"--vision-model: .* \({config.model_type}\) {tower}", tower=tmp_path / "other")


def test_without_the_hub_the_command_that_fetches_the_files_is_named(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = refused("--language-model: Qwen/Qwen3-8B is not a folder here", llm="Qwen/Qwen3-8B")
    assert "hf download Qwen/Qwen3-8B --local-dir models/Qwen3-8B" in message
    match = r"--vision-model: google/siglip is not a folder here.* and give --vision-model models/siglip\.$"
    refused(match, tower="google/siglip")
    refused("the folder no/such/folder does not exist", llm="no/such/folder")


def test_quantized_models_are_refused_before_their_weights_are_read(refused: Refused, llm: Path, tower: Path) -> None:
    for folder in (llm, tower):
        (folder / "model.safetensors").unlink()
        for method in ("fp8", "gptq"):
            edit(folder / "config.json", quantization_config={"quant_method": method})
            message = refused(
                rf"is quantized \(quantization_config in config.json, method {method}\).* unquantized",
                **{folder.name: folder},
            )
            assert message.startswith("--language-model" if folder is llm else "--vision-model")


# configuration and weights


def test_a_configuration_that_is_broken_or_refused_by_transformers_is_named(
    refused: Refused, llm: Path, tower: Path
) -> None:
    good = (llm / "config.json").read_text()
    edit(llm / "config.json", hidden_act="nothing_known")
    refused(r"no model can be made of config.json .*nothing_known", llm=llm)
    (llm / "config.json").write_text(good)
    edit(llm / "config.json", num_hidden_layers=3)
    refused(r"--language-model: .* is not a valid configuration .*`num_hidden_layers` \(3\) must be equal", llm=llm)
    for text, match in (("{", r"not a valid JSON file.* whole"), ("{}", r"have a `model_type` key")):
        for folder, key in ((llm, "--language-model"), (tower, "--vision-model")):
            (folder / "config.json").write_text(text)
            refused(rf"{key}: .*config.json is not a valid configuration .*{match}", **{folder.name: folder})


def test_weights_that_are_cut_short_or_of_another_model_are_refused(
    refused: Refused, llm: Path, tower: Path, tmp_path: Path
) -> None:
    weights = llm / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(r"--language-model: .*model.safetensors.* Copy or download llm again, whole", llm=llm)
    (tower / "model.safetensors").write_bytes(b"")
    refused(r"--vision-model: .*model.safetensors.* Copy or download tower again, whole", tower=tower)


@pytest.mark.parametrize(
    "stored_in, stated, fault",
    [
        ({"layers": 1}, {}, r"language_model.layers.1.* is missing, config.json asks for it"),
        ({"layers": 3}, {}, r"language_model.layers.2.* is left over"),
        ({"rows": 448}, {"vocab_size": 440}, r"in 2 tensors.* is \(448, 48\), config.json asks for \(440, 48\)"),
        ({"rows": 448}, {"vocab_size": 500}, r"in 2 tensors.* is \(448, 48\), config.json asks for \(500, 48\)"),
    ],
)
def test_weights_of_another_configuration_are_refused(
    stored_in: dict, stated: dict, fault: str, refused: Refused, llm: Path, tmp_path: Path
) -> None:
    other = save_language_model("qwen3", tmp_path / "other", **stored_in)
    if not stated:
        (other / "config.json").write_bytes((llm / "config.json").read_bytes())
    edit(other / "config.json", **stated)
    refused(rf"--language-model: configuration and weights of {other} do not belong together .*{fault}", llm=other)


def test_one_tensor_of_another_shape_is_refused(refused: Refused, tower: Path, tmp_path: Path) -> None:
    llm = save_language_model("qwen3", tmp_path / "llm", rows=448)
    wrong = {"vision_model.post_layernorm.bias": (7,), "lm_head.weight": (440, 48)}
    for folder, (name, shape) in zip((tower, llm), wrong.items(), strict=True):
        save_file(stored(folder) | {name: torch.ones(shape)}, folder / "model.safetensors")
        fault = re.escape(f"{name.removeprefix('vision_model.')} is {shape}, config.json asks for (")
        refused(rf"--\w+-model: .* {folder} do not .* in 1 tensors.*{fault}", **{folder.name: folder})


@pytest.mark.parametrize(
    "content",
    [b"junk" * 100, b"", pickle.dumps({"a": 1}, protocol=2), [torch.ones(2)], {"state_dict": {"a": torch.ones(2)}}],
    ids=["junk", "empty", "number", "list", "nested"],
)
def test_pickled_weights_that_cannot_be_read_are_refused(content: Any, refused: Refused, llm: Path) -> None:
    (llm / "model.safetensors").unlink()
    file = llm / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    refused(rf"{file} cannot be read as named tensors.* Copy or download llm again, whole", llm=llm)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_a_stored_head_beside_tied_embeddings_is_kept_where_it_differs(
    same: bool, pickled: bool, build: Build, llm: Path
) -> None:
    edit(llm / "config.json", tie_word_embeddings=True)
    weights = stored(llm)
    head = weights["model.embed_tokens.weight"].clone()
    if not same:
        head[-1, -1] += 1
    weights["lm_head.weight"] = head
    (llm / "model.safetensors").unlink()
    if pickled:
        torch.save(weights, llm / "pytorch_model.bin")
    else:
        save_file(weights, llm / "model.safetensors", {"format": "pt"})
    llava = load(build(llm).folder)
    assert (llava.lm_head.weight is llava.get_input_embeddings().weight) is same
    assert torch.equal(llava.lm_head.weight[: len(head)], head.float())
    reference = tf.AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(llava(input_ids=PROMPT).logits[..., : len(head)], reference(PROMPT).logits)


# tokenizer and image processor


def test_a_tokenizer_that_is_missing_or_of_another_model_is_refused(
    refused: Refused, llm: Path, tmp_path: Path
) -> None:
    small = save_language_model("qwen3", tmp_path / "small", rows=390, pad_token_id=None)
    refused(r"has a word with the number 399, vocab_size in config.json is 390", llm=small)
    other = save_language_model("qwen3", tmp_path / "other", rows=1000, eos_token_id=[2, 900])
    refused(r"eos_token_id in config.json is 900, and it has 403 tokens", llm=other)
    nothing = (
        rf"--language-model: the tokenizer in {llm} is not .* encodes the text 'What .*' to nothing. Copy tokenizer"
    )
    file = llm / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"model": content["model"] | {"vocab": {}, "merges": []}}))
    refused(nothing, llm=llm)
    for path in llm.glob("tokenizer*"):
        path.unlink()
    refused(nothing, llm=llm)
    (llm / "vocab.json").write_text(json.dumps(new_tokenizer("qwen3").get_vocab()))
    refused(r"--language-model: the tokenizer in .*merges", llm=llm)
    file.write_text('{"version": "1.0", "model": ')
    refused(r"--language-model: the tokenizer in .* cannot be opened .* again, whole", llm=llm)


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("chat_template.jinja", "{{ raise_exception('no') }}", r"its chat template cannot render .*no.* Copy chat_t"),
        ("generation_config.json", "{", r"generation_config\.json is not JSON .*Copy .* again, whole, or remove it"),
        ("generation_config.json", "[1]", r"generation_config\.json of the same model again, whole, or remove it"),
    ],
)
def test_a_chat_template_or_generation_settings_that_cannot_be_used_are_refused(
    file: str, content: str, match: str, refused: Refused, llm: Path
) -> None:
    (llm / file).write_text(content)
    refused(f"--language-model: .*{match}", llm=llm)


def test_a_token_that_was_added_behind_the_embedding_gets_a_row(build: Build, llm: Path) -> None:
    tokenizer = new_tokenizer("qwen3").from_pretrained(llm)
    tokenizer.add_tokens(["<pad>"], special_tokens=True)
    tokenizer.save_pretrained(llm)
    assert build(llm).image_token_id == 404


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"do_center_crop": False}, r"makes images of \[\(32, 42\), \(53, 32\)\] pixels, .* Set do_center_crop"),
        ({"image_mean": "none"}, r"cannot be used .* Copy or download preprocessor_config.json of the same model"),
        (
            {"size": {"height": 64, "width": 64}, "crop_size": {"height": 64, "width": 64}},
            r"makes images of \[\(64, 64\)\] pixels, .* the vision tower's \(32, 32\) .* and crop_size to \(32, 32\)",
        ),
        (None, r"cannot be used .* Copy or download preprocessor_config.json of the same model"),
    ],
)
def test_an_image_processor_that_does_not_fit_is_refused(
    settings: dict | None, match: str, refused: Refused, tower: Path
) -> None:
    if settings is None:
        (tower / "preprocessor_config.json").unlink()
    else:
        edit(tower / "preprocessor_config.json", **settings)
    refused(rf"--vision-model: the image processor of {tower} {match}", tower=tower)


def test_padding_is_refused_where_the_towers_processor_does_more_than_llavas(refused: Refused, tower: Path) -> None:
    edit(tower / "preprocessor_config.json", image_processor_type="ConvNextImageProcessor", crop_pct=0.5)
    match = "--image-aspect-ratio: pad cannot be had with a ConvNextImageProcessor.* give square"
    refused(match, tower=tower, image_aspect_ratio="pad")


def test_dinov2_takes_images_of_another_size_than_it_was_trained_on(
    build: Build, checkpoints: dict, tmp_path: Path
) -> None:
    # as the hub's: trained at 518 pixels, used at 224
    tower = shutil.copytree(checkpoints["dinov2"], tmp_path / "tower")
    edit(tower / "preprocessor_config.json", size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    built = build(tower=tower)
    assert built.image_tokens == 64
    inputs = tf.AutoProcessor.from_pretrained(built.folder)(
        images=Image.new("RGB", (40, 30)), text="<image>\nWhat is it?", return_tensors="pt"
    )
    assert load(built.folder)(**inputs).logits.isfinite().all()
