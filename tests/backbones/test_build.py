"""`build`: what goes into a model comes out of it, for every family of language models and of vision towers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from llamafactory_hera.cli import main

from .conftest import Build
from .tiny import FAMILIES, TOWERS, new_tokenizer, save_language_model

PROMPT = torch.tensor([[5, 70, 300, 41, 7, 260]])


def load(folder: Path) -> tf.LlavaForConditionalGeneration:
    model, info = tf.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def same(folder: Path, other: Path) -> bool:
    ours, theirs = stored(folder), stored(other)
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_is_inside_bit_by_bit(family: str, checkpoints: dict, build: Build) -> None:
    built = build(family)
    theirs, ours = stored(checkpoints[family]), stored(built.folder)
    for name, tensor in theirs.items():
        inside = ours[f"language_model.{name}"]
        assert inside.dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(inside[: tensor.shape[0]], tensor), name
    assert built.template == FAMILIES[family]

    llm = tf.AutoModelForCausalLM.from_pretrained(checkpoints[family], dtype=torch.float32).eval()
    llava = load(built.folder)
    with torch.no_grad():
        expected = llm(PROMPT).logits
        logits = llava(input_ids=PROMPT).logits
    assert torch.equal(logits[..., : expected.shape[-1]], expected)

    rows = llava.get_input_embeddings().num_embeddings
    assert rows % 64 == 0
    assert built.image_token_id == llm.config.vocab_size < rows == built.vocabulary
    mean = theirs["model.embed_tokens.weight"].mean(dim=0, dtype=torch.float32).to(torch.bfloat16)
    assert torch.equal(ours["language_model.model.embed_tokens.weight"][built.image_token_id], mean)
    assert sum(p.numel() for p in llava.parameters()) == built.n_parameters


@pytest.mark.parametrize("tower", TOWERS)
def test_the_towers_patch_tokens_are_the_images_tokens(tower: str, checkpoints: dict, build: Build) -> None:
    built = build(tower=tower)
    llava, processor = load(built.folder), tf.AutoProcessor.from_pretrained(built.folder)
    image = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB")
    inputs = processor(images=image, text="<image>\nWhat is it?", return_tensors="pt")
    assert (inputs["input_ids"] == built.image_token_id).sum() == built.image_tokens == 16
    assert llava.config.image_seq_length == 16

    alone = {"clip": tf.CLIPVisionModel, "dinov2": tf.Dinov2Model}.get(tower, tf.SiglipVisionModel)
    reference = alone.from_pretrained(checkpoints[tower], dtype=torch.float32).eval()
    with torch.no_grad():
        last = reference(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]
        patches = last[:, 1:] if tower in ("clip", "dinov2") else last
        assert patches.shape[1] == 16
        expected = llava.model.multi_modal_projector(patches)[0]
        features = llava.get_image_features(
            inputs["pixel_values"],
            vision_feature_layer=llava.config.vision_feature_layer,
            vision_feature_select_strategy=llava.config.vision_feature_select_strategy,
        ).pooler_output[0]
        assert torch.equal(features, expected)
        seen = llava(**inputs).logits[:, -1]
        other = llava(**inputs | {"pixel_values": -inputs["pixel_values"]}).logits[:, -1]
    assert not torch.allclose(seen, other)


@pytest.mark.parametrize("tower", ["siglip", "clip", "dinov2"])
def test_images_are_padded_to_squares_before_the_towers_own_processor(
    tower: str, checkpoints: dict, build: Build, tmp_path: Path
) -> None:
    from llamafactory.data.mm_plugin import get_mm_plugin

    folder = shutil.copytree(checkpoints[tower], tmp_path / "tower")
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    settings |= {"resample": 2, "image_mean": [0.2, 0.4, 0.6], "image_std": [0.3, 0.4, 0.5]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    own = tf.AutoImageProcessor.from_pretrained(folder)
    wide = Image.effect_noise((640, 480), 80).convert("RGB")
    squares = {}
    for name, image, corner in (("wide", wide, (0, 80)), ("high", wide.rotate(90, expand=True), (80, 0))):
        squares[name] = image, Image.new("RGB", (640, 640), (51, 102, 153))
        squares[name][1].paste(image, corner)

    built = build(tower=folder, image_aspect_ratio="pad").folder
    tf.AutoProcessor.from_pretrained(built).save_pretrained(tmp_path / "again")
    host = get_mm_plugin("llava", image_token="<image>")
    for place in (built, tmp_path / "again"):
        processor = tf.AutoProcessor.from_pretrained(place)
        for image, square in squares.values():
            expected = own(square, return_tensors="pt")["pixel_values"]
            assert torch.equal(processor(images=image, text="<image>", return_tensors="pt")["pixel_values"], expected)
            # what the host trains and chats with
            inputs = host.get_mm_inputs([image], [], [], [1], [], [], [], processor)
            assert torch.equal(inputs["pixel_values"], expected)


def test_tied_embeddings_stay_tied(build: Build, tmp_path: Path) -> None:
    llm = save_language_model("qwen2_5", tmp_path / "llm", tie_word_embeddings=True)
    built = build(llm)
    llava = load(built.folder)
    assert llava.lm_head.weight is llava.get_input_embeddings().weight
    assert "language_model.lm_head.weight" not in stored(built.folder)
    reference = tf.AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(llava(input_ids=PROMPT).logits[..., :403], reference(PROMPT).logits)


@pytest.mark.parametrize("there", [False, True])
def test_rows_to_spare_and_a_special_image_token_that_is_there_are_used(
    there: bool, build: Build, tmp_path: Path
) -> None:
    llm = save_language_model("qwen3", tmp_path / "llm", rows=448)
    if there:
        tokenizer = tf.AutoTokenizer.from_pretrained(llm)
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        tokenizer.save_pretrained(llm)
    built = build(llm)
    assert (built.image_token_id, built.vocabulary) == (403, 448)
    assert len(tf.AutoTokenizer.from_pretrained(built.folder)) == 404
    embedding = "model.embed_tokens.weight"
    assert torch.equal(stored(built.folder)[f"language_model.{embedding}"], stored(llm)[embedding])


def test_generation_settings_are_the_language_models_with_the_chats_end(
    checkpoints: dict, build: Build, tmp_path: Path
) -> None:
    llm = shutil.copytree(checkpoints["llama3_base"], tmp_path / "llm")
    own = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 7, "bos_token_id": 5, "pad_token_id": 8}
    (llm / "generation_config.json").write_text(json.dumps(own))
    with_file = json.loads((build(llm).folder / "generation_config.json").read_text())
    end = new_tokenizer("llama3_base").convert_tokens_to_ids("<|eot_id|>")
    assert with_file == own | {"eos_token_id": [7, end]}
    (llm / "generation_config.json").unlink()
    settings = tf.GenerationConfig.from_pretrained(build(llm, output="without").folder)
    eos = json.loads((llm / "config.json").read_text())["eos_token_id"]
    assert settings.eos_token_id == [eos, end]


def test_old_pickled_checkpoints_are_read(checkpoints: dict, build: Build, tmp_path: Path) -> None:
    source = checkpoints["vicuna"]
    folder = shutil.copytree(source, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = stored(source)
    halves = [dict(list(tensors.items())[:9]), dict(list(tensors.items())[9:])]
    halves[0]["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)  # a buffer that was stored once
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for name, half in zip(names, halves, strict=True):
        torch.save(half, folder / name)
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    built = build(folder)
    assert same(built.folder, build(source, output="plain").folder)


def test_large_models_are_cut_into_files_of_the_size_asked_for(build: Build) -> None:
    whole, cut = build(output="whole"), build(output="cut", shard_gib=60_000 / 2**30)
    files = list(cut.folder.glob("*.safetensors"))
    assert len(files) > 3
    assert max(file.stat().st_size for file in files) < 65_000
    assert same(cut.folder, whole.folder)
    load(cut.folder)


def test_every_tensor_keeps_its_own_dtype(checkpoints: dict, build: Build, tmp_path: Path) -> None:
    llm = shutil.copytree(checkpoints["qwen3"], tmp_path / "llm")
    weights = {name: t.float() if "norm" in name else t for name, t in stored(llm).items()}
    save_file(weights, llm / "model.safetensors", {"format": "pt"})
    built = build(llm).folder
    assert json.loads((built / "config.json").read_text())["dtype"] == "bfloat16"
    dtypes = {name: tensor.dtype for name, tensor in stored(built).items()}
    assert {dtypes[f"language_model.{name}"] == tensor.dtype for name, tensor in weights.items()} == {True}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("vision_tower.")} == {torch.float32}


def test_the_seed_decides_the_projector_and_nothing_else(build: Build) -> None:
    models = {name: stored(build(output=name, seed=seed).folder) for name, seed in (("a", 0), ("again", 0), ("b", 1))}
    assert {name for name, tensor in models["a"].items() if not torch.equal(tensor, models["b"][name])} == {
        f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")
    }
    assert all(torch.equal(tensor, models["again"][name]) for name, tensor in models["a"].items())
    weights = models["a"]["multi_modal_projector.linear_1.weight"].float()
    # uniform in +-1/sqrt(fan_in)
    assert weights.abs().max() <= 32**-0.5
    assert weights.std() == pytest.approx(32**-0.5 / 3**0.5, rel=0.1)


def test_the_command_builds_and_says_what_to_write_into_a_recipe(
    checkpoints: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--language-model", str(checkpoints["llama3"]), "--vision-model", str(checkpoints["clip"])]
    arguments += ["--image-aspect-ratio", "pad"]
    assert main(["build", *arguments, "--output", str(tmp_path / "built")]) == 0
    assert tf.AutoProcessor.from_pretrained(tmp_path / "built").image_processor.do_pad
    printed = capsys.readouterr().out
    assert "an image takes 16 tokens of cutoff_len" in printed
    assert "template: llava_plain in stage 1, llava_llama3 in stage 2" in printed
    load(tmp_path / "built")
