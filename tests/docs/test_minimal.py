"""The loop of docs/minimal.md aligns the heads of a tiny model."""

import re
from pathlib import Path

import torch
from PIL import Image
from tests.tiny_models import collate_rows, image_rows, teacher_folder, vlm

PAGE = Path(__file__).parents[2] / "docs/minimal.md"


def test_the_loop_runs_and_the_agreement_rises(tmp_path, monkeypatch, capsys):
    (tmp_path / "facebook").mkdir()
    (tmp_path / "facebook/dinov2-large").symlink_to(teacher_folder())
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.strip().splitlines()) <= 40
    for page, here in (("L13H12,L7H6", "L1H0,L0H2"), ("10, 0.01", "3, 1.0"), ("lr=2e-5", "lr=3e-3")):
        assert page in code
        code = code.replace(page, here)
    model = vlm("llava-llama")
    rows = image_rows(model, 10)
    images = [Image.fromarray((torch.rand(32, 32, 3) * 255).byte().numpy()) for _ in rows]
    batch = collate_rows([{name: value for name, value in row.items() if name != "images"} for row in rows])
    exec(code, {"model": model, "loader": [(dict(batch), images) for _ in range(25)]})
    mknn = [float(value) for value in re.findall(r"MKNN (\d\.\d+)", capsys.readouterr().out)]
    assert len(mknn) == 25
    assert mknn[-1] > mknn[0] + 0.1
