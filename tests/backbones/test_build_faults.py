"""`build` with bad input, and interrupted: nothing half-written is ever loadable, and a second start continues."""

import json
import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import transformers as tf
from huggingface_hub import constants

from llamafactory_hera.backbones import work_folder
from llamafactory_hera.backbones.assemble import build_backbone

from .test_assemble import load, stored
from .tiny import new_tokenizer, save_language_model

SMALL_SHARD = 30_000 / 2**30


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """A real write error in the middle of a larger file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def largest_shard(folder: Path) -> int:
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


def build(checkpoints: dict, output: Path, llm: str | Path = "qwen3", tower: str | Path = "siglip", **options):
    return build_backbone(str(checkpoints.get(llm, llm)), str(checkpoints.get(tower, tower)), output, **options)


def test_a_full_disk_leaves_nothing_to_load_and_the_next_start_continues(checkpoints: dict, tmp_path: Path) -> None:
    whole = build(checkpoints, tmp_path / "whole", shard_gib=SMALL_SHARD)
    shards = sorted(file.name for file in whole.folder.glob("*.safetensors"))
    assert len(shards) > 3
    output, partial = tmp_path / "built", tmp_path / "built.partial"
    smaller = files_no_larger_than(largest_shard(whole.folder) - 1)
    with smaller, pytest.raises(ValueError, match=r"--output: .* cannot be written") as caught:
        build(checkpoints, output, shard_gib=SMALL_SHARD)
    assert "run the same command again" in " ".join(str(caught.value).split())
    assert not output.exists()
    done = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert 0 < len(done) < len(shards)
    assert not list(partial.glob("*.tmp"))
    with pytest.raises(OSError):
        tf.LlavaForConditionalGeneration.from_pretrained(partial)

    lines: list[str] = []
    build(checkpoints, output, shard_gib=SMALL_SHARD, report=lines.append)
    assert sum("there already" in line for line in lines) == len(done)
    assert not partial.exists()
    assert {name: (output / name).stat().st_mtime_ns for name in done} == done
    expected = stored(whole.folder)
    assert stored(output).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored(output).items())
    load(output)


def test_a_shard_that_was_cut_short_is_written_again(checkpoints: dict, tmp_path: Path) -> None:
    whole = build(checkpoints, tmp_path / "whole", shard_gib=SMALL_SHARD)
    output, partial = tmp_path / "built", tmp_path / "built.partial"
    smaller = files_no_larger_than(largest_shard(whole.folder) - 1)
    with smaller, pytest.raises(ValueError, match="cannot be written"):
        build(checkpoints, output, shard_gib=SMALL_SHARD)
    victim = sorted(partial.glob("*.safetensors"))[0]
    victim.write_bytes(victim.read_bytes()[:-7])
    build(checkpoints, output, shard_gib=SMALL_SHARD)
    expected = stored(whole.folder)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored(output).items())


def test_too_little_room_is_told_before_anything_is_copied(
    checkpoints: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(work_folder.shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 1000, 1000))
    with pytest.raises(ValueError, match=r"--output: \d{3}\.\d KiB are needed for .*, 1000 bytes are free; make room"):
        build(checkpoints, tmp_path / "built")
    assert not (tmp_path / "built.partial").exists()


def test_an_unfinished_build_of_something_else_is_left_alone(checkpoints: dict, tmp_path: Path) -> None:
    whole = build(checkpoints, tmp_path / "whole", shard_gib=SMALL_SHARD)
    smaller = files_no_larger_than(largest_shard(whole.folder) - 1)
    with smaller, pytest.raises(ValueError, match="cannot be written"):
        build(checkpoints, tmp_path / "built", shard_gib=SMALL_SHARD)
    with pytest.raises(ValueError, match="unfinished build of other models or with other options"):
        build(checkpoints, tmp_path / "built", llm="llama3", shard_gib=SMALL_SHARD)
    with pytest.raises(ValueError, match="unfinished build of other models or with other options"):
        build(checkpoints, tmp_path / "built", shard_gib=SMALL_SHARD, seed=1)


def test_an_output_that_holds_files_is_left_alone(checkpoints: dict, tmp_path: Path) -> None:
    (tmp_path / "built").mkdir()
    (tmp_path / "built" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"--output: .* is not empty"):
        build(checkpoints, tmp_path / "built")
    assert [file.name for file in (tmp_path / "built").iterdir()] == ["thesis.txt"]
    (tmp_path / "empty").mkdir()
    load(build(checkpoints, tmp_path / "empty").folder)


def test_swapped_checkpoints_are_told(checkpoints: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--language-model: .* vision encoder \(siglip\); were .* swapped"):
        build(checkpoints, tmp_path / "built", llm="siglip", tower="qwen3")
    with pytest.raises(ValueError, match=r"--vision-model: .* language model \(qwen3\); were .* swapped"):
        build(checkpoints, tmp_path / "built", tower="qwen3")
    assert not (tmp_path / "built.partial").exists()


def test_a_model_that_sees_already_is_not_built_upon(checkpoints: dict, tmp_path: Path) -> None:
    built = build(checkpoints, tmp_path / "built")
    with pytest.raises(ValueError, match=r"--language-model: .* \(llava\) is multimodal already"):
        build(checkpoints, tmp_path / "again", llm=built.folder)


def test_an_unknown_architecture_names_the_missing_line(checkpoints: dict, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    tf.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"model type 'gpt2' .* missing from FAMILIES in heads/families.py"):
        build(checkpoints, tmp_path / "built", llm=folder)


@pytest.mark.parametrize(
    "config, remedy",
    [
        (tf.Siglip2Config, r"\(siglip2\) cannot be the vision tower: .* give a fixed-resolution one"),
        (tf.Dinov2WithRegistersConfig, r"register tokens .* give facebook/dinov2-large"),
        (tf.ResNetConfig, r"\(resnet\) cannot be the vision tower: give one of these types: clip, "),
    ],
)
def test_towers_that_llava_cannot_take_are_refused(
    config: type, remedy: str, checkpoints: dict, tmp_path: Path
) -> None:
    config().save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match=remedy):
        build(checkpoints, tmp_path / "built", tower=tmp_path / "tower")


def test_an_image_token_that_is_an_ordinary_word_is_refused(checkpoints: dict, tmp_path: Path) -> None:
    llm = save_language_model("qwen3", tmp_path / "llm")
    file = llm / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    word = next(w for w in sorted(vocabulary) if w.isalpha() and len(w) > 4)
    number = vocabulary.pop(word)
    content["model"]["merges"] = [m for m in content["model"]["merges"] if word not in ("".join(m), *m)]
    vocabulary["<image>"] = number
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"<image> as an ordinary word"):
        build(checkpoints, tmp_path / "built", llm=llm)
    assert "<image>" not in new_tokenizer("qwen3").get_vocab()


def test_weights_that_are_not_whole_or_of_another_model_are_told(checkpoints: dict, tmp_path: Path) -> None:
    cut = shutil.copytree(checkpoints["qwen3"], tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"--language-model: .*Copy or download cut again, whole"):
        build(checkpoints, tmp_path / "built", llm=cut)
    other = save_language_model("qwen3", tmp_path / "other", layers=3)
    (other / "config.json").write_bytes((checkpoints["qwen3"] / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"--language-model: configuration and weights .* do not belong together"):
        build(checkpoints, tmp_path / "built", llm=other)
    tower = shutil.copytree(checkpoints["siglip"], tmp_path / "tower")
    (tower / "model.safetensors").write_bytes((checkpoints["siglip_alone"] / "model.safetensors").read_bytes()[:0])
    with pytest.raises(ValueError, match=r"--vision-model: "):
        build(checkpoints, tmp_path / "built", tower=tower)


def test_an_image_processor_without_one_size_is_refused(checkpoints: dict, tmp_path: Path) -> None:
    tower = shutil.copytree(checkpoints["clip"], tmp_path / "tower")
    file = tower / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_center_crop": False}))
    with pytest.raises(ValueError, match="makes images of different sizes"):
        build(checkpoints, tmp_path / "built", tower=tower)


def test_without_the_hub_the_files_to_place_are_named(
    checkpoints: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as caught:
        build(checkpoints, tmp_path / "built", llm="Qwen/Qwen3-8B")
    assert "--language-model: Qwen/Qwen3-8B is no folder here" in str(caught.value)
    assert "hf download Qwen/Qwen3-8B --local-dir models/Qwen3-8B" in str(caught.value)
    match = r"--vision-model: google/siglip2-so400m-patch14-384 is no folder here.* and give --vision-model FOLDER\.$"
    with pytest.raises(ValueError, match=match):
        build(checkpoints, tmp_path / "built", tower="google/siglip2-so400m-patch14-384")
    with pytest.raises(ValueError, match="the folder no/such/folder does not exist"):
        build(checkpoints, tmp_path / "built", llm="no/such/folder")
