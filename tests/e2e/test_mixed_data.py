"""Mixed data, loaded in every way: the right samples enter the HeRA term, and runs finish."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ..backbones.standins import save_native
from ..backbones.tiny import save_tower

pytestmark = pytest.mark.slow

K = 2
#: The images of each sample in one batch. Three samples begin with image a, so they form three duplicate pairs.
IMAGES = [["a"], ["b"], ["a", "b"], ["c"], ["d"], ["a"], [], [], []]
#: The videos of each sample: the last two have a video, and the one before them is only text.
VIDEOS = [[]] * 7 + [["b", "c"], ["c", "d"]]


def _sample(images: list[str], videos: list[str]) -> dict[str, Any]:
    question = "<image>" * len(images) + "<video>" * bool(videos) + "What is it?"
    answer = f"It is {' and '.join(images or videos) or 'nothing'}."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {
        "messages": messages,
        "images": [f"{name}.png" for name in images],
        "videos": [[f"{name}.png" for name in videos]] if videos else [],
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Qwen2.5-VL, a teacher, and one batch of mixed samples."""
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


def test_only_samples_with_an_image_enter_and_duplicates_are_not_neighbors(train, root):
    args = {"model_name_or_path": "model", "template": "qwen2_vl", "cutoff_len": 512, "max_steps": 2}
    args |= {"dataset": "mixed", "dataset_dir": ".", "media_dir": ".", "per_device_train_batch_size": len(IMAGES)}
    args |= {"hera_heads": "L0H1,L1H0", "hera_teacher": "teacher", "hera_teacher_cache": None, "hera_k": K}
    run = train(args, cwd=root)
    first = [images[0] for images in IMAGES if images]
    candidates = [sum(other != image for other in first) for image in first]
    chance = sum(min(K, n // 2) / n for n in candidates) / len(first)  # at most half of them are neighbors
    copies = sum(first[i] == first[j] for i in range(len(first)) for j in range(i))
    for line in run.logs():
        assert line["hera_duplicates"] == copies == 3
        assert line["hera_mknn_chance"] == pytest.approx(chance)
        assert 0 < line["hera_loss"] < 10


def test_a_run_reads_a_stream(train):
    args: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4}
    args |= {"dataloader_num_workers": 1, "streaming": True, "buffer_size": 32}
    # With dispatch_batches, the first process reads all batches, and they must have equal lengths, in any stage.
    run = train(args, {"accelerator_config": {"dispatch_batches": False}}, ranks=2)
    assert len(run.logs()) == 3
    assert all(math.isfinite(line["loss"]) and line["hera_loss"] > 0 for line in run.logs())
