"""`build` copies its parts unchanged for all families and encoders, and leaves no files if it refuses bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration as Llava

from llamafactory_hera.cli import main

from ..ranks import full_disk
from ..tiny_models import edit_json, same
from .conftest import Build
from .tiny import FAMILIES, TOWERS, new_tokenizer, save_language_model

PROMPT = torch.tensor([[5, 70, 300, 41, 7, 260]])


def load(folder: Path) -> Llava:
    model, info = Llava.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@torch.no_grad()
def same_logits(llava: Llava, llm: Path) -> bool:
    expected = tf.AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32).eval()(PROMPT).logits
    return torch.equal(llava(input_ids=PROMPT).logits[..., : expected.shape[-1]], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_is_copied_bit_for_bit(family, checkpoints, build):
    built = build(family)
    theirs, ours = stored(checkpoints[family]), stored(built.folder)
    for name, tensor in theirs.items():
        copy = ours[f"language_model.{name}"]
        assert copy.dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(copy[: tensor.shape[0]], tensor), name
    llava = load(built.folder)
    assert same_logits(llava, checkpoints[family])
    assert llava.get_input_embeddings().num_embeddings % 64 == 0
    mean = theirs["model.embed_tokens.weight"].mean(dim=0, dtype=torch.float32).to(torch.bfloat16)
    assert torch.equal(ours["language_model.model.embed_tokens.weight"][built.image_token_id], mean)
    assert sum(p.numel() for p in llava.parameters()) == built.n_parameters
    assert json.loads((built.folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {tensor.dtype for name, tensor in ours.items() if "vision_tower" in name} == {torch.float32}


@pytest.mark.parametrize("tower, side", [*((tower, 32) for tower in TOWERS), ("dinov2", 64)])
def test_image_tokens_are_patch_tokens(tower, side, checkpoints, build, tmp_path):
    folder = shutil.copytree(checkpoints[tower], tmp_path / "tower")
    if side == 64:  # The sizes in the processor and the config may differ: 224 and 518 pixels for DINOv2 on the hub.
        edit_json(
            folder / "preprocessor_config.json", size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
        )
    built = build(tower=folder)
    llava, processor = load(built.folder), tf.AutoProcessor.from_pretrained(built.folder)
    image = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 50).convert("RGB")
    inputs = processor(images=image, text="<image>\nWhat is it?", return_tensors="pt")
    places = inputs["input_ids"] == built.image_token_id
    assert places.sum() == built.image_tokens == llava.config.image_seq_length == (side // 8) ** 2
    seen = {}
    llava.model.language_model.register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    alone = {"clip": tf.CLIPVisionModel, "dinov2": tf.Dinov2Model}.get(tower, tf.SiglipVisionModel)
    reference = alone.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        last = reference(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]
        patches = last[:, 1:] if tower in ("clip", "dinov2") else last
        expected = llava.model.multi_modal_projector(patches)
        llava(**inputs)
    assert torch.equal(seen["inputs_embeds"][places], expected[0])


@pytest.mark.parametrize("tower", ["siglip", "clip", "dinov2"])
def test_pad_makes_squares_for_the_encoder(tower, checkpoints, build, tmp_path):
    from llamafactory.data.mm_plugin import get_mm_plugin

    folder = shutil.copytree(checkpoints[tower], tmp_path / "tower")
    edit_json(folder / "preprocessor_config.json", resample=2, image_mean=[0.2, 0.4, 0.6], image_std=[0.3, 0.4, 0.5])
    reference = tf.AutoImageProcessor.from_pretrained(folder)
    wide = Image.effect_noise((640, 480), 80).convert("RGB")
    built = build(tower=folder, image_aspect_ratio="pad").folder
    tf.AutoProcessor.from_pretrained(built).save_pretrained(tmp_path / "again")
    host = get_mm_plugin("llava", image_token="<image>")
    for image, corner in ((wide, (0, 80)), (wide.rotate(90, expand=True), (80, 0))):
        square = Image.new("RGB", (640, 640), (51, 102, 153))
        square.paste(image, corner)
        expected = reference(square, return_tensors="pt")["pixel_values"]
        for processor in map(tf.AutoProcessor.from_pretrained, (built, tmp_path / "again")):
            assert torch.equal(processor(images=image, text="<image>", return_tensors="pt")["pixel_values"], expected)
            inputs = host.get_mm_inputs([image], [], [], [1], [], [], [], processor)
            assert torch.equal(inputs["pixel_values"], expected)


@pytest.mark.parametrize("head", ["absent", "equal", "different"])
def test_embeddings_stay_tied_unless_a_different_head_is_stored(head, build, tmp_path):
    llm = save_language_model("qwen2_5", tmp_path / "llm", tie_word_embeddings=True)
    weights = stored(llm)
    if head != "absent":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + (head == "different")
    save_file(weights, llm / "model.safetensors", {"format": "pt"})
    llava = load(build(llm).folder)
    assert (llava.lm_head.weight is llava.get_input_embeddings().weight) == (head != "different")
    assert same_logits(llava, llm)


@pytest.mark.parametrize("known", [False, True])
def test_the_image_token_uses_a_free_row_or_an_existing_token(known, build, tmp_path):
    llm = save_language_model("qwen3", tmp_path / "llm", vocab_size=448)
    if known:
        tokenizer = tf.AutoTokenizer.from_pretrained(llm)
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        tokenizer.save_pretrained(llm)
    built = build(llm)
    assert built.image_token_id == 403
    assert len(tf.AutoTokenizer.from_pretrained(built.folder)) == 404
    name = "model.embed_tokens.weight"
    assert torch.equal(stored(built.folder)[f"language_model.{name}"], stored(llm)[name])


def test_a_generation_also_ends_at_the_end_of_a_turn(checkpoints, build, tmp_path):
    llm = shutil.copytree(checkpoints["llama3_base"], tmp_path / "llm")
    settings = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": 7, "bos_token_id": 5, "pad_token_id": 8}
    (llm / "generation_config.json").write_text(json.dumps(settings))
    end = new_tokenizer("llama3_base").convert_tokens_to_ids("<|eot_id|>")
    built = json.loads((build(llm).folder / "generation_config.json").read_text())
    assert built == settings | {"eos_token_id": [7, end]}
    (llm / "generation_config.json").unlink()
    eos = json.loads((llm / "config.json").read_text())["eos_token_id"]
    assert tf.GenerationConfig.from_pretrained(build(llm, output="without").folder).eos_token_id == [eos, end]


def test_old_pickled_checkpoints_are_read(build, tmp_path):
    llm = save_language_model("vicuna", tmp_path / "llm", vocab_size=512)
    weights = stored(llm)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, llm / "model.safetensors", {"format": "pt"})
    expected = stored(build(llm, output="expected").folder)
    (llm / "model.safetensors").unlink()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]  # The two tensors share memory in the pickle.
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)  # Old versions stored this buffer.
    for i, names in enumerate((list(weights)[:9], list(weights)[9:]), 1):
        torch.save({name: weights[name] for name in names}, llm / f"pytorch_model-0000{i}-of-00002.bin")
    assert same(stored(build(llm).folder), expected)


def test_the_seed_changes_the_projector_and_nothing_else(build):
    one, again, other = (stored(build(output=f"{i}", seed=seed).folder) for i, seed in enumerate((0, 0, 10**20)))
    assert same(one, again)
    projector = {f"multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert {name for name, tensor in one.items() if not torch.equal(tensor, other[name])} == projector
    weights = one["multi_modal_projector.linear_1.weight"].float()
    assert weights.abs().max() == pytest.approx(32**-0.5, rel=0.1)  # uniform in ±1/sqrt(fan_in), PyTorch's default


def test_the_command_prints_what_a_recipe_needs(checkpoints, tmp_path, capsys):
    models = ["--language-model", str(checkpoints["llama3"]), "--vision-model", str(checkpoints["clip"])]
    assert main(["build", *models, "--image-aspect-ratio", "pad", "--output", str(tmp_path / "built")]) == 0
    assert tf.AutoProcessor.from_pretrained(tmp_path / "built").image_processor.do_pad
    printed = capsys.readouterr().out
    assert "an image takes 16 tokens of cutoff_len" in printed
    assert "template: llava_plain in stage 1, llava_llama3 in stage 2" in printed


OTHER_LLMS = [tf.SiglipConfig(), tf.LlavaConfig(), tf.GPT2Config(), tf.Gemma2Config()]
OTHER_LLMS += [tf.GraniteConfig(logits_scaling=8)]
OTHER_TOWERS = [tf.Qwen3Config(), tf.Siglip2Config(), tf.Dinov2WithRegistersConfig()]


def refuse(build: Build, tmp_path: Path, match: str, **options) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        build(**options)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("built*"))


@pytest.fixture
def llm(checkpoints: dict, tmp_path: Path) -> Path:
    """A copy of a language model, to be damaged."""
    return shutil.copytree(checkpoints["qwen3"], tmp_path / "llm")


@pytest.mark.parametrize("role, config", [("llm", c) for c in OTHER_LLMS] + [("tower", c) for c in OTHER_TOWERS])
def test_models_that_llava_cannot_contain_are_refused(role, config, build, tmp_path):
    config.save_pretrained(tmp_path / "other")
    key = {"llm": "--language-model", "tower": "--vision-model"}[role]
    match = rf"^{key}: .*other \({config.model_type}\) is not supported; give a .* of type "
    refuse(build, tmp_path, match, **{role: tmp_path / "other"})


@pytest.mark.parametrize("role, name", [("llm", "qwen3"), ("tower", "clip")])
def test_a_quantized_model_is_refused(role, name, checkpoints, build, tmp_path):
    folder = shutil.copytree(checkpoints[name], tmp_path / "quantized")
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    refuse(build, tmp_path, "quantized is quantized; give the unquantized checkpoint", **{role: folder})


def test_weights_that_do_not_match_the_configuration_are_refused(llm, build, tmp_path):
    for changed, problem in (
        ({"num_hidden_layers": 1}, r"missing_keys: \S*language_model\.\S*layers\.1\."),
        ({"num_hidden_layers": 3}, r"unexpected_keys: \S*language_model\.\S*layers\.2\."),
        ({"vocab_size": 448}, r"mismatched_keys: .*448.* 2 in total"),
    ):
        other = save_language_model("qwen3", tmp_path / "other", **changed)
        shutil.copy(llm / "config.json", other)
        refuse(build, tmp_path, rf"^--language-model: the weights do not match config\.json .*{problem}", llm=other)


def test_weights_that_are_nan_or_cut_short_are_refused(llm, build, tmp_path):
    weights, file = stored(llm), llm / "model.safetensors"
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, file, {"format": "pt"})
    refuse(build, tmp_path, r"^--language-model: .*llm has weights that are NaN .* such as model\.norm\.w", llm=llm)
    file.write_bytes(file.read_bytes()[:-100])
    refuse(build, tmp_path, r"^--language-model: .*model\.safetensors cannot be read .*; download it again", llm=llm)


def test_a_missing_tokenizer_and_a_tokenizer_with_a_larger_vocabulary_are_refused(llm, build, tmp_path):
    match = r"^--language-model: .* has no tokenizer, or another model's; copy this model's tokenizer\.json"
    small = save_language_model("qwen3", tmp_path / "small", vocab_size=100, pad_token_id=None)
    refuse(build, tmp_path, match, llm=small)
    for path in llm.glob("tokenizer*"):
        path.unlink()
    refuse(build, tmp_path, match, llm=llm)


def test_a_full_disk_leaves_nothing(build, tmp_path):
    tf.logging.set_verbosity_error()  # The size limit also applies to log files.
    with full_disk(100_000), pytest.raises(OSError, match=r"--output: .*built cannot be written"):
        build()
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file_or_has_files_is_refused(build, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.txt").write_text("mine")
    for output in ("full", "full/thesis.txt"):
        with pytest.raises(ValueError, match=rf"^--output: .*{output} is not an empty folder; give another folder"):
            build(output=output)
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "thesis.txt"]


def test_a_link_to_an_empty_folder_stays_and_leads_to_the_model(build, tmp_path):
    (tmp_path / "disk/target").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/target")
    build(output="link")
    assert (tmp_path / "link").is_symlink()
    load(tmp_path / "link")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["target"]
