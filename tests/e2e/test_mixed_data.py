"""Data of every kind and every way to load it: what enters the HeRA term, and that runs go through."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ..backbones.standins import save_native
from ..backbones.tiny import save_tower
from .runner import HostServer, Run

pytestmark = pytest.mark.slow

K = 2
#: Images of the samples of one batch. A is shown three times (once as the first of two), so three pairs are the same.
IMAGES = [["a"], ["b"], ["a", "b"], ["c"], ["d"], ["a"], [], [], []]
#: The last two samples show a video, the one before is text.
VIDEOS = [[]] * 7 + [["b", "c"], ["c", "d"]]


def _sample(images: list[str], videos: list[str]) -> dict[str, Any]:
    asked = "<image>" * len(images) + "<video>" * bool(videos) + "What is it?"
    answer = f"It is {' and '.join(images or videos) or 'nothing'}."
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {
        "messages": messages,
        "images": [f"{name}.png" for name in images],
        "videos": [[f"{name}.png" for name in videos]] if videos else [],
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Qwen2.5-VL, a teacher, and one batch of everything."""
    folder = tmp_path_factory.mktemp("mixed")
    save_native("qwen2_5_vl_7b", folder / "model")
    save_tower("dinov2", folder / "teacher")
    for name, seed in zip("abcd", range(4), strict=True):
        torch.manual_seed(seed)
        Image.fromarray(torch.randint(0, 255, (56, 56, 3), dtype=torch.uint8).numpy()).save(folder / f"{name}.png")
    rows = [_sample(images, videos) for images, videos in zip(IMAGES, VIDEOS, strict=True)]
    (folder / "mixed.json").write_text(json.dumps(rows))
    columns = {"messages": "messages", "images": "images", "videos": "videos"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "mixed.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"mixed": entry}))
    return folder


def test_only_samples_with_an_image_enter_and_copies_are_no_neighbors(
    server: HostServer, place: Path, recipe: dict
) -> None:
    args = {
        "model_name_or_path": "model",
        "template": "qwen2_vl",
        "hera_heads": "L0H1,L1H0",
        "hera_teacher": "teacher",
        "hera_teacher_cache": None,
        "hera_k": K,
        "dataset_dir": ".",
        "media_dir": ".",
        "dataset": "mixed",
        "cutoff_len": 512,
        "per_device_train_batch_size": len(IMAGES),
        "max_steps": 2,
        "output_dir": "saves/mixed",
    }
    run = server.run({key: value for key, value in (recipe | args).items() if value is not None}, place)
    assert run.ok, run.output
    shown = [images[0] for images in IMAGES if images]
    candidates = [sum(other != image for other in shown) for image in shown]
    chance = sum(min(K, n // 2) / n for n in candidates) / len(shown)  # at most half are neighbors
    copies = sum(shown[i] == shown[j] for i in range(len(shown)) for j in range(i))
    for line in run.logs():
        assert line["hera_duplicates"] == copies == 3
        assert line["hera_mknn_chance"] == pytest.approx(chance)
        assert 0 < line["hera_loss"] < 10


def _check(run: Run, n_steps: int) -> None:
    assert run.ok, run.output
    assert len(run.logs()) == n_steps
    for line in run.logs():
        assert math.isfinite(line["loss"])
        assert line["hera_loss"] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stream_is_read(server: HostServer, world: Path, recipe: dict, ranks: int) -> None:
    args = {"output_dir": f"saves/streaming_{ranks}", "max_steps": 3, "per_device_train_batch_size": 4}
    args |= {"dataloader_num_workers": 1, "streaming": True, "buffer_size": 32}
    # otherwise accelerate has the first process read all batches, which must then have one length; so for any stage
    args |= {"ddp_backend": "gloo", "accelerator_config": {"dispatch_batches": False}} if ranks > 1 else {}
    _check(server.run(recipe | args, world, ranks=ranks), 3)


@pytest.mark.parametrize("ranks", [1, 2])
def test_batches_grouped_by_length_show_images_or_are_short_text(
    server: HostServer, world: Path, recipe: dict, ranks: int
) -> None:
    args = {"dataset": "hera_demo,hera_demo_text", "max_samples": 32, "max_steps": -1, "num_train_epochs": 1.0}
    args |= {"train_sampling_strategy": "group_by_length", "dataloader_num_workers": 1, "hera_k": 1}
    args |= {"per_device_train_batch_size": 4 // ranks, "output_dir": f"saves/grouped_{ranks}"}
    run = server.run(recipe | args | ({"ddp_backend": "gloo"} if ranks > 1 else {}), world, ranks=ranks)
    assert run.ok, run.output
    of_images = [line for line in run.logs() if line.get("hera_mknn_chance") == pytest.approx(1 / 3)]
    of_text = [line for line in run.logs() if line.get("hera_empty_steps")]
    # transformers sorts four groups of four batches, so at most one batch of a group mixes both kinds
    assert len(of_images) + len(of_text) >= 12
    assert min(len(of_images), len(of_text)) > 3


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_last_batch_may_be_incomplete(server: HostServer, world: Path, recipe: dict, ranks: int) -> None:
    # 11 samples: 4 and 4 and 3 of one process, 4 and 4 and then 2 and 1 of two
    args = {"output_dir": f"saves/last_{ranks}", "max_samples": 11, "max_steps": -1, "num_train_epochs": 2.0}
    args |= {"per_device_train_batch_size": 4} | ({"ddp_backend": "gloo"} if ranks > 1 else {})
    run = server.run(recipe | args, world, ranks=ranks)
    _check(run, 6 if ranks == 1 else 4)
