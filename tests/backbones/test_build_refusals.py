"""`build` refuses bad input in one line, and the output folder contains a complete model or nothing."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

from ..ranks import full_disk
from ..tiny_models import edit_json
from .conftest import Build
from .test_build import load, stored
from .tiny import save_language_model

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


MISFITS = [
    ({"num_hidden_layers": 1}, r"missing_keys: \S*language_model\.\S*layers\.1\."),
    ({"num_hidden_layers": 3}, r"unexpected_keys: \S*language_model\.\S*layers\.2\."),
    ({"vocab_size": 448}, r"mismatched_keys: .*448.* 2 in total"),
]


@pytest.mark.parametrize("changed, problem", MISFITS)
def test_other_weights_are_refused(changed, problem, llm, build, tmp_path):
    other = save_language_model("qwen3", tmp_path / "other", **changed)
    shutil.copy(llm / "config.json", other)
    refuse(build, tmp_path, rf"^--language-model: the weights do not match config\.json .*{problem}", llm=other)


def test_weights_that_are_cut_short_are_refused(llm, build, tmp_path):
    weights = llm / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refuse(build, tmp_path, r"^--language-model: .*model\.safetensors cannot be read .*; download it again", llm=llm)


def test_weights_that_are_nan_are_refused(llm, build, tmp_path):
    weights = stored(llm)
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, llm / "model.safetensors", {"format": "pt"})
    refuse(
        build, tmp_path, r"^--language-model: .*llm has weights that are NaN .* such as model\.norm\.weight", llm=llm
    )


def test_no_tokenizer_or_one_of_a_larger_vocabulary_is_refused(llm, build, tmp_path):
    match = r"^--language-model: .* has no tokenizer, or that of a different model; copy tokenizer\.json"
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
