"""Where the teacher's images are decoded."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from llamafactory_hera.integrations.llamafactory import collator
from llamafactory_hera.integrations.llamafactory.collator import HeraCollator
from llamafactory_hera.teachers.checkpoint import check_teacher
from llamafactory_hera.teachers.encoder import TeacherProcessor

from ..backbones.tiny import save_tower


def _host(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(len(features), 3, dtype=torch.long)}


def test_images_are_decoded_in_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tower("dinov2", tmp_path / "teacher")
    log, load = tmp_path / "pids", collator.load_image

    def logged(image: Any) -> Image.Image:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return load(image)

    monkeypatch.setattr(collator, "load_image", logged)
    Image.new("RGB", (20, 12), "red").save(tmp_path / "red.png")
    samples = [{"images": [str(tmp_path / "red.png")]}] * 6
    collate = HeraCollator(_host, TeacherProcessor(check_teacher(str(tmp_path / "teacher"))))
    for batch in DataLoader(samples, batch_size=2, num_workers=2, collate_fn=collate):
        assert batch["hera_pixels"].abs().sum() > 0
    pids = log.read_text().split()
    assert len(pids) == 6
    assert str(os.getpid()) not in pids
