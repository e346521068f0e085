"""`build` looks at what it is given before it makes anything: each fault names its option, value and remedy."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import save_file

from .test_assemble import PROMPT, load, stored
from .test_build_faults import build
from .tiny import new_tokenizer, save_language_model


def refused(checkpoints: dict, output: Path, match: str, **options) -> str:
    with pytest.raises(ValueError, match=match) as caught:
        build(checkpoints, output, **options)
    assert not output.exists()
    assert not output.with_name(f"{output.name}.partial").exists()
    return str(caught.value)


def copy(folder: Path, target: Path) -> Path:
    return shutil.copytree(folder, target)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_language_model_without_its_tokenizer_is_refused(checkpoints: dict, tmp_path: Path) -> None:
    llm = copy(checkpoints["qwen3"], tmp_path / "llm")
    for file in llm.glob("tokenizer*"):
        file.unlink()
    message = refused(checkpoints, tmp_path / "built", rf"--language-model: {llm} holds no tokenizer", llm=llm)
    assert "neither tokenizer.json, nor tokenizer.model" in message
    assert "Copy the tokenizer's files" in message
    (llm / "vocab.json").write_text(json.dumps(new_tokenizer("qwen3").get_vocab()))
    refused(checkpoints, tmp_path / "built", "nor vocab.json with merges.txt", llm=llm)
    (llm / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    refused(checkpoints, tmp_path / "built", r"--language-model: the tokenizer in .* cannot be opened", llm=llm)


def test_a_tokenizer_of_another_model_is_refused(checkpoints: dict, tmp_path: Path) -> None:
    small = save_language_model("qwen3", tmp_path / "small", rows=390, pad_token_id=None)
    refused(checkpoints, tmp_path / "built", r"has the number 399, vocab_size in config.json is 390", llm=small)

    other = save_language_model("qwen3", tmp_path / "other", rows=1000, eos_token_id=[2, 900])
    refused(checkpoints, tmp_path / "built", r"eos_token_id in config.json is 900, and it has 403 tokens", llm=other)

    empty = copy(checkpoints["qwen3"], tmp_path / "empty")
    tokenizer = json.loads((empty / "tokenizer.json").read_text())
    tokenizer["model"] |= {"vocab": {}, "merges": []}
    (empty / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(checkpoints, tmp_path / "built", r"encodes the text 'What .*' to nothing", llm=empty)


def test_a_token_that_was_added_behind_the_embedding_gets_a_row(checkpoints: dict, tmp_path: Path) -> None:
    llm = copy(checkpoints["qwen3"], tmp_path / "llm")
    tokenizer = new_tokenizer("qwen3").from_pretrained(llm)
    tokenizer.add_tokens(["<pad>"], special_tokens=True)
    tokenizer.save_pretrained(llm)
    assert build(checkpoints, tmp_path / "built", llm=llm).image_token_id == 404


QUANTISED = r"{key}: .* is quantised \(quantization_config in config.json, method {method}\).* unquantised checkpoint"


@pytest.mark.parametrize("method", ["fp8", "gptq"])
def test_quantised_models_are_refused_before_their_weights_are_read(
    method: str, checkpoints: dict, tmp_path: Path
) -> None:
    for key, name in (("--language-model", "qwen3"), ("--vision-model", "siglip")):
        folder = copy(checkpoints[name], tmp_path / name)
        edit(folder / "config.json", quantization_config={"quant_method": method})
        (folder / "model.safetensors").unlink()
        option = {"llm" if name == "qwen3" else "tower": folder}
        refused(checkpoints, tmp_path / "built", QUANTISED.format(key=key, method=method), **option)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_quantised_models_that_say_so_in_a_file_of_its_own_are_refused(
    name: str, checkpoints: dict, tmp_path: Path
) -> None:
    llm = copy(checkpoints["qwen3"], tmp_path / "llm")
    (llm / name).write_text('{"bits": 4}')
    told = rf"--language-model: .* is quantised \({name}\).* unquantised checkpoint"
    refused(checkpoints, tmp_path / "built", told, llm=llm)


def test_eight_bit_weights_are_refused_without_a_word_of_it_in_the_configuration(
    checkpoints: dict, tmp_path: Path
) -> None:
    llm = copy(checkpoints["qwen3"], tmp_path / "llm")
    weights = stored(llm)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.float8_e4m3fn)}, llm / "model.safetensors")
    refused(checkpoints, tmp_path / "built", rf"--language-model: .*{name} as F8_E4M3.* unquantised", llm=llm)


def test_a_configuration_that_transformers_refuses_is_told(checkpoints: dict, tmp_path: Path) -> None:
    llm, tower = copy(checkpoints["qwen3"], tmp_path / "llm"), copy(checkpoints["siglip"], tmp_path / "tower")
    good = (llm / "config.json").read_text()
    edit(llm / "config.json", num_hidden_layers=3)
    message = refused(checkpoints, tmp_path / "built", r"--language-model: .* no valid configuration", llm=llm)
    assert "`num_hidden_layers` (3) must be equal" in message
    assert "\n" not in message
    (llm / "config.json").write_text(good)
    edit(llm / "config.json", hidden_act="nothing_known")
    refused(checkpoints, tmp_path / "built", r"no model can be made of config.json .*nothing_known", llm=llm)
    for text, match in (
        ("{", r"config.json cannot be read as JSON.* whole"),
        ("{}", r"config.json has no model_type"),
    ):
        (llm / "config.json").write_text(text)
        refused(checkpoints, tmp_path / "built", r"--language-model: .*" + match, llm=llm)
        (tower / "config.json").write_text(text)
        refused(checkpoints, tmp_path / "built", r"--vision-model: .*" + match, tower=tower)


@pytest.mark.parametrize(
    "content",
    [b"junk" * 100, b"", pickle.dumps({"a": 1}, protocol=2), "list", "nested"],
    ids=["junk", "empty", "number", "list", "nested"],
)
def test_pickled_weights_that_cannot_be_read_are_told(content: bytes | str, checkpoints: dict, tmp_path: Path) -> None:
    llm = copy(checkpoints["qwen3"], tmp_path / "llm")
    (llm / "model.safetensors").unlink()
    file = llm / "pytorch_model.bin"
    torch.save(stored(checkpoints["qwen3"]), file)
    build(checkpoints, tmp_path / "good", llm=llm)  # what was read is not remembered under the file's name
    file.unlink()
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save([torch.ones(2)] if content == "list" else {"state_dict": {"a": torch.ones(2)}}, file)
    match = rf"--language-model: {file} (cannot be read|holds something else).* Copy or download llm again, whole"
    refused(checkpoints, tmp_path / "built", match, llm=llm)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_images_of_another_size_than_the_towers_are_refused(kind: str, checkpoints: dict, tmp_path: Path) -> None:
    tower, square = copy(checkpoints[kind], tmp_path / "tower"), {"height": 64, "width": 64}
    edit(tower / "preprocessor_config.json", size=square, crop_size=square)
    match = r"--vision-model: .* 64 x 64 pixels \(size .*\), the vision tower takes 32 x 32 .* Set them to 32 x 32"
    refused(checkpoints, tmp_path / "built", match, tower=tower)


def test_dinov2_takes_images_of_another_size_than_it_was_trained_on(checkpoints: dict, tmp_path: Path) -> None:
    tower = copy(checkpoints["dinov2"], tmp_path / "tower")  # as the hub's: trained at 518 pixels, used at 224
    edit(tower / "preprocessor_config.json", size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    built = build(checkpoints, tmp_path / "built", tower=tower)
    assert built.image_tokens == 64
    inputs = tf.AutoProcessor.from_pretrained(built.folder)(
        images=Image.new("RGB", (40, 30)), text="<image>\nWhat is it?", return_tensors="pt"
    )
    assert load(built.folder)(**inputs).logits.isfinite().all()


def test_a_tower_without_its_image_processor_is_refused(checkpoints: dict, tmp_path: Path) -> None:
    tower = copy(checkpoints["clip"], tmp_path / "tower")
    edit(tower / "preprocessor_config.json", image_mean="none")
    refused(checkpoints, tmp_path / "built", r"--vision-model: the image processor .* cannot be used", tower=tower)
    (tower / "preprocessor_config.json").unlink()
    match = rf"--vision-model: {tower} holds no preprocessor_config.json.* copy that of the same model"
    refused(checkpoints, tmp_path / "built", match, tower=tower)


@pytest.mark.parametrize("stated, head_only", [(440, False), (500, False), (448, True)])
def test_a_vocabulary_that_is_not_the_stored_one_is_refused(
    stated: int, head_only: bool, checkpoints: dict, tmp_path: Path
) -> None:
    llm = save_language_model("qwen3", tmp_path / "llm", rows=448)
    edit(llm / "config.json", vocab_size=stated)
    name = "lm_head.weight" if head_only else "model.embed_tokens.weight"
    if head_only:
        weights = stored(llm)
        save_file(weights | {name: weights[name][:440].contiguous()}, llm / "model.safetensors")
    rows = 440 if head_only else 448
    match = rf"--language-model: vocab_size in .* is {stated}, and {name} is stored with {rows} rows"
    refused(checkpoints, tmp_path / "built", match, llm=llm)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_a_stored_head_beside_tied_embeddings_is_kept_where_it_differs(
    same: bool, pickled: bool, checkpoints: dict, tmp_path: Path
) -> None:
    llm = save_language_model("qwen3", tmp_path / "llm", rows=9000)  # more than is compared at a time
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
    llava = load(build(checkpoints, tmp_path / "built", llm=llm).folder)
    assert (llava.lm_head.weight is llava.get_input_embeddings().weight) is same
    assert torch.equal(llava.lm_head.weight, head.float())
    reference = tf.AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(llava(input_ids=PROMPT).logits, reference(PROMPT).logits)
