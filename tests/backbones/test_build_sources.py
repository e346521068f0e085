"""`build` looks at what it is given before it makes anything: each fault names its option, value and remedy."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

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


def test_models_that_are_swapped_or_see_already_are_refused(refused: Refused, build: Build) -> None:
    refused(r"--language-model: .* vision encoder \(siglip\); were .* swapped", llm="siglip", tower="qwen3")
    refused(r"--vision-model: .* language model \(qwen3\); were .* swapped", tower="qwen3")
    finished = build(output="finished").folder
    refused(r"--language-model: .* \(llava\) is multimodal already", llm=finished)


def test_an_unknown_architecture_names_the_missing_line(refused: Refused, tmp_path: Path) -> None:
    tf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16).save_pretrained(tmp_path / "gpt2")
    refused(r"model type 'gpt2' .* missing from FAMILIES in heads/families.py", llm=tmp_path / "gpt2")


@pytest.mark.parametrize(
    "config, remedy",
    [
        (tf.Siglip2Config, r"\(siglip2\) cannot be the vision tower: .* give a fixed-resolution one"),
        (tf.Dinov2WithRegistersConfig, r"register tokens .* give facebook/dinov2-large"),
        (tf.ResNetConfig, r"\(resnet\) cannot be the vision tower: give one of these types: clip, "),
    ],
)
def test_towers_that_llava_cannot_take_are_refused(
    config: type, remedy: str, refused: Refused, tmp_path: Path
) -> None:
    config().save_pretrained(tmp_path / "other")
    refused(remedy, tower=tmp_path / "other")


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


@pytest.mark.parametrize("key, name", [("--language-model", "qwen3"), ("--vision-model", "clip")])
@pytest.mark.parametrize("method", ["fp8", "gptq"])
def test_quantised_models_are_refused_before_their_weights_are_read(
    method: str, key: str, name: str, refused: Refused, llm: Path, tower: Path
) -> None:
    option = {"llm": llm} if name == "qwen3" else {"tower": tower}
    (folder,) = option.values()
    edit(folder / "config.json", quantization_config={"quant_method": method})
    (folder / "model.safetensors").unlink()
    quantised = rf"{key}: .* is quantised \(quantization_config in config.json, method {method}\).* unquantised"
    refused(quantised, **option)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_quantised_models_that_say_so_in_a_file_of_its_own_are_refused(name: str, refused: Refused, llm: Path) -> None:
    (llm / name).write_text('{"bits": 4}')
    refused(rf"--language-model: .* is quantised \({name}\).* unquantised checkpoint", llm=llm)


# configuration and weights


def test_a_configuration_that_is_broken_or_refused_by_transformers_is_named(
    refused: Refused, llm: Path, tower: Path
) -> None:
    good = (llm / "config.json").read_text()
    edit(llm / "config.json", num_hidden_layers=3)
    message = refused(r"--language-model: .* is not a valid configuration", llm=llm)
    assert "`num_hidden_layers` (3) must be equal" in message
    (llm / "config.json").write_text(good)
    edit(llm / "config.json", hidden_act="nothing_known")
    refused(r"no model can be made of config.json .*nothing_known", llm=llm)
    for text, match in (("{", r"config.json is not JSON.* whole"), ("{}", r"config.json has no model_type")):
        (llm / "config.json").write_text(text)
        refused(r"--language-model: .*" + match, llm=llm)
        (tower / "config.json").write_text(text)
        refused(r"--vision-model: .*" + match, tower=tower)


def test_weights_that_are_cut_short_or_of_another_model_are_refused(
    refused: Refused, llm: Path, tower: Path, tmp_path: Path
) -> None:
    weights = llm / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(r"--language-model: .*model.safetensors.* Copy or download llm again, whole", llm=llm)
    (tower / "model.safetensors").write_bytes(b"")
    refused(r"--vision-model: .*model.safetensors.* Copy or download tower again, whole", tower=tower)


@pytest.mark.parametrize(
    "layers, fault", [(1, r"language_model.layers.1.* is missing"), (3, r"language_model.layers.2.* is left over")]
)
def test_tensors_that_the_configuration_does_not_ask_for_are_refused(
    layers: int, fault: str, refused: Refused, llm: Path, tmp_path: Path
) -> None:
    other = save_language_model("qwen3", tmp_path / "other", layers=layers)
    (other / "config.json").write_bytes((llm / "config.json").read_bytes())
    refused(rf"--language-model: configuration and weights of {other} do not belong together .*{fault}", llm=other)


def test_tensors_of_another_shape_than_the_configuration_asks_for_are_refused(
    refused: Refused, checkpoints: dict, tower: Path
) -> None:
    weights = stored(tower)
    name = "vision_model.post_layernorm.bias"
    save_file(weights | {name: torch.ones(7)}, tower / "model.safetensors")
    match = r"--vision-model: .* in 1 tensors.*post_layernorm.bias is \(7,\), config.json asks for \(32,\)"
    refused(match, tower=tower)


def test_eight_bit_weights_are_refused_without_a_word_of_it_in_the_configuration(refused: Refused, llm: Path) -> None:
    weights, name = stored(llm), "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, llm / "model.safetensors")
    refused(rf"--language-model: .*{name} as torch.float8_e4m3fn, as quantised .* unquantised", llm=llm)


@pytest.mark.parametrize(
    "content",
    [b"junk" * 100, b"", pickle.dumps({"a": 1}, protocol=2), "list", "nested"],
    ids=["junk", "empty", "number", "list", "nested"],
)
def test_pickled_weights_that_cannot_be_read_are_refused(content: bytes | str, refused: Refused, llm: Path) -> None:
    (llm / "model.safetensors").unlink()
    file = llm / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save([torch.ones(2)] if content == "list" else {"state_dict": {"a": torch.ones(2)}}, file)
    refused(rf"{file} (cannot be read|holds something else).* Copy or download llm again, whole", llm=llm)


@pytest.mark.parametrize("stated, head_only", [(440, False), (500, False), (448, True)])
def test_a_vocabulary_that_is_not_the_stored_one_is_refused(
    stated: int, head_only: bool, refused: Refused, tmp_path: Path
) -> None:
    llm = save_language_model("qwen3", tmp_path / "llm", rows=448)
    edit(llm / "config.json", vocab_size=stated)
    name = "lm_head.weight" if head_only else "model.embed_tokens.weight"
    if head_only:
        weights = stored(llm)
        save_file(weights | {name: weights[name][:440].contiguous()}, llm / "model.safetensors")
    rows = 440 if head_only else 448
    refused(rf"--language-model: vocab_size in .* is {stated}, and {name} is stored with {rows} rows", llm=llm)


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


def test_a_language_model_without_its_tokenizer_is_refused(refused: Refused, llm: Path) -> None:
    for file in llm.glob("tokenizer*"):
        file.unlink()
    message = refused(rf"--language-model: {llm} holds no tokenizer", llm=llm)
    assert "neither tokenizer.json, nor tokenizer.model" in message
    assert "Copy the tokenizer's files" in message
    (llm / "vocab.json").write_text(json.dumps(new_tokenizer("qwen3").get_vocab()))
    refused("nor vocab.json with merges.txt", llm=llm)
    (llm / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    refused(r"--language-model: the tokenizer in .* cannot be opened", llm=llm)


def test_a_tokenizer_of_another_model_is_refused(refused: Refused, llm: Path, tmp_path: Path) -> None:
    small = save_language_model("qwen3", tmp_path / "small", rows=390, pad_token_id=None)
    refused(r"has the number 399, vocab_size in config.json is 390", llm=small)
    other = save_language_model("qwen3", tmp_path / "other", rows=1000, eos_token_id=[2, 900])
    refused(r"eos_token_id in config.json is 900, and it has 403 tokens", llm=other)
    tokenizer = json.loads((llm / "tokenizer.json").read_text())
    tokenizer["model"] |= {"vocab": {}, "merges": []}
    (llm / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(r"encodes the text 'What .*' to nothing", llm=llm)


def test_a_token_that_was_added_behind_the_embedding_gets_a_row(build: Build, llm: Path) -> None:
    tokenizer = new_tokenizer("qwen3").from_pretrained(llm)
    tokenizer.add_tokens(["<pad>"], special_tokens=True)
    tokenizer.save_pretrained(llm)
    assert build(llm).image_token_id == 404


def test_an_image_token_that_is_an_ordinary_word_is_refused(refused: Refused, llm: Path) -> None:
    file = llm / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    word = next(w for w in sorted(vocabulary) if w.isalpha() and len(w) > 4)
    number = vocabulary.pop(word)
    content["model"]["merges"] = [m for m in content["model"]["merges"] if word not in ("".join(m), *m)]
    vocabulary["<image>"] = number
    file.write_text(json.dumps(content))
    refused(r"<image> as an ordinary word", llm=llm)


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"do_center_crop": False}, r"makes images of different sizes"),
        ({"image_mean": "none"}, r"--vision-model: the image processor .* cannot be used"),
        (
            {"size": {"height": 64, "width": 64}, "crop_size": {"height": 64, "width": 64}},
            r"--vision-model: .* 64 x 64 pixels \(size .*\), the vision tower takes 32 x 32 .* Set them to 32 x 32",
        ),
        (None, r"--vision-model: .* holds no preprocessor_config.json.* copy that of the same model"),
    ],
)
def test_an_image_processor_that_does_not_fit_is_refused(
    settings: dict | None, match: str, refused: Refused, tower: Path
) -> None:
    if settings is None:
        (tower / "preprocessor_config.json").unlink()
    else:
        edit(tower / "preprocessor_config.json", **settings)
    refused(match, tower=tower)


def test_dinov2_takes_images_of_another_size_than_it_was_trained_on(
    build: Build, checkpoints: dict, tmp_path: Path
) -> None:
    tower = shutil.copytree(
        checkpoints["dinov2"], tmp_path / "tower"
    )  # as the hub's: trained at 518 pixels, used at 224
    edit(tower / "preprocessor_config.json", size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    built = build(tower=tower)
    assert built.image_tokens == 64
    inputs = tf.AutoProcessor.from_pretrained(built.folder)(
        images=Image.new("RGB", (40, 30)), text="<image>\nWhat is it?", return_tensors="pt"
    )
    assert load(built.folder)(**inputs).logits.isfinite().all()
