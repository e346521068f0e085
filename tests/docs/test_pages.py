"""The code in the pages runs, their imports work, and their relative links lead to existing files."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_models import collate_rows, image_rows, noise_images, snapshot, teacher_folder, vlm

ROOT = Path(__file__).parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(page for part in ("docs", "patches", "recipes") for page in (ROOT / part).rglob("*.md")),
]


@pytest.mark.parametrize("page", sorted(PAGES), ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_existing_files(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    inside = [target.split("#")[0] for target in targets if not re.match(r"[a-z]+:", target)]
    missing = [target for target in inside if target and not (page.parent / target).exists()]
    assert not missing


def code_of(page: str, longest: int = 29) -> list[str]:
    """Returns the Python code of a page; no block may have more lines than ``longest``."""
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert all(len(code.strip().splitlines()) <= longest for code in found)
    return found


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Defines the names that the pages' code uses; its teacher is a tiny model in the working directory."""
    (tmp_path / "facebook").mkdir()
    (tmp_path / "facebook/dinov2-large").symlink_to(teacher_folder())
    monkeypatch.chdir(tmp_path)
    for key, value in (("ACCELERATE_USE_CPU", "true"), ("CUDA_VISIBLE_DEVICES", "")):
        monkeypatch.setenv(key, value)
    model = vlm("llava-llama")
    return {"model": model, "dataset": image_rows(model, 64), "collate": collate_rows}


def test_the_minimal_loop_raises_the_agreement(names, capsys):
    (code,) = code_of("docs/minimal.md", longest=40)
    for page, here in (("L13H12,L7H6", "L1H0,L0H2"), ("10, 0.01", "3, 1.0"), ("lr=2e-5", "lr=3e-3")):
        assert page in code
        code = code.replace(page, here)
    rows = [{name: value for name, value in row.items() if name != "images"} for row in names["dataset"][:10]]
    images = noise_images(10, (32, 32))
    exec(code, {"model": names["model"], "loader": [(collate_rows(rows), images) for _ in range(25)]})
    mknn = [float(value) for value in re.findall(r"MKNN (\d\.\d+)", capsys.readouterr().out)]
    assert len(mknn) == 25
    assert mknn[-1] > mknn[0] + 0.1


def trained(before: dict[str, torch.Tensor], model: torch.nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_the_trainer_the_mixin_and_the_loop_train(names, capsys):
    plain, mixin, _, loop, *_ = code_of("docs/plain_trainer.md")
    before = snapshot(names["model"])
    names["model"].config.use_cache = False
    exec(plain, names)
    *_, logged = (line for line in names["trainer"].state.log_history if "loss" in line)
    assert {"lm_loss", "hera_loss", "hera_mknn", "hera_temperature"} <= set(logged)
    assert {"state.safetensors", "heads.json"} <= {path.name for path in Path("saves/plain/hera").iterdir()}
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in trained(before, names["model"])

    capsys.readouterr()
    exec(mixin, names)
    assert "'hera_loss'" in capsys.readouterr().out

    before = snapshot(names["model"])
    exec(loop, names)
    assert "'hera_loss': " in capsys.readouterr().out.splitlines()[-1]
    assert "model.language_model.layers.0.self_attn.q_proj.weight" in trained(before, names["model"])
    assert Path("saves/loop/hera/state.safetensors").is_file()


def test_a_dataset_that_drops_its_images_keeps_them_for_the_teacher(names):
    class LazySupervisedDataset(torch.utils.data.Dataset):
        """A stand-in for QwenLM's dataset, whose encoded rows have no images."""

        def __init__(self, processor: list, data_args: str) -> None:
            self.rows = [{**row, "image": f"{n}.png", "data_path": data_args} for n, row in enumerate(processor)]

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, number: int) -> dict[str, Any]:
            return self._get_item([self.rows[number]])

        def _get_item(self, sources: list[dict]) -> dict[str, Any]:
            return {name: value for name, value in sources[0].items() if isinstance(value, torch.Tensor)}

    rows = names["dataset"]
    for number, row in enumerate(rows):
        row["images"][0].save(f"{number}.png")
    names |= {"LazySupervisedDataset": LazySupervisedDataset, "Path": Path, "data_module": {}}
    names |= {"processor": rows, "data_args": str(Path.cwd())}
    plain, _, kept, *_ = code_of("docs/plain_trainer.md")
    exec(kept, names)
    assert names["data_module"]["train_dataset"][3]["images"] == [str(Path("3.png").resolve())]
    names["dataset"] = names["data_module"]["train_dataset"]
    exec(plain, names)
    assert any("hera_loss" in line for line in names["trainer"].state.log_history)


def test_the_imports_in_the_readme_work():
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^from llamafactory_hera\S* import .+", page, re.MULTILINE)
    assert lines
    for line in lines:
        exec(line, {})


def test_the_functions_alone_give_a_loss_and_gradients(names):
    *_, functions = code_of("docs/plain_trainer.md")
    rows = [{name: value for name, value in row.items() if name != "images"} for row in names["dataset"]]
    names |= {"batch": collate_rows(rows), "teacher_features": torch.randn(64, 5)}
    names["model"].zero_grad()
    exec(functions, names)
    assert names["z"].shape == (2, 64, 48)
    lm_loss = names["model"](**names["batch"]).loss
    assert names["loss"] > lm_loss
    names["loss"].backward()
    assert names["model"].model.language_model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
