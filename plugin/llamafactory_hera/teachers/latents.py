"""A frozen image autoencoder of diffusers, whose latents are ROSS's target.

What is computed follows Haochen-Wang409/ross, commit 20ffc6b, ``ross/model/ross_arch.py`` and
``ross/model/pixel_decoder/flux_decoder.py``.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import read_json
from ..hub import CONFIG_FILE
from .checkpoint import KEY, teacher_fingerprint, teacher_folder, whole_teacher_folder

_CLASS = "AutoencoderKL"
_WHAT = f"a diffusers {_CLASS} (of a whole pipeline its sub-folder, vae)"


def check_latent_teacher(name_or_path: str) -> Path:
    """Checks that a folder or hub id holds an AutoencoderKL with whole weights, and diffusers is there; loads none.

    Returns:
        The folder.

    Raises:
        ValueError: It does not, or the hub is out of reach; names the key, the value and the remedy.
    """
    value = str(name_or_path)
    if find_spec("diffusers") is None:
        raise ValueError(f'{KEY}: {value} is read by diffusers, not installed: pip install "llamafactory-hera[ross]".')
    file = teacher_folder(value, weights=False, what=_WHAT) / CONFIG_FILE
    try:
        config = read_json(file)
        kind = config.get("_class_name")
    except (ValueError, AttributeError) as error:  # the latter where it holds no JSON object
        raise ValueError(f"{KEY}: {error}. Copy or download the teacher {value} again, whole.") from error
    if kind != _CLASS:
        raise ValueError(f"{KEY}: {value} is not an {_CLASS} (its _class_name is {kind!r}). Give {_WHAT}.")
    if missing := [name for name in ("shift_factor", "scaling_factor") if config.get(name) is None]:
        raise ValueError(
            f"{KEY}: {file} has no {' and no '.join(missing)}, by which its latents are centered and scaled. Give "
            "an autoencoder that has both, such as FLUX.1-dev's."
        )
    return whole_teacher_folder(value, _WHAT)


class LatentTeacher:
    """The encoder of a frozen AutoencoderKL; no `torch.nn.Module`, for the reason of `encoder.VisionTeacher`.

    Attributes:
        dim: Channels of a token's target, those of 2 x 2 latents.
        fingerprint: Digest of its config and weights, see `teacher_fingerprint`.
    """

    def __init__(self, model: Any, fingerprint: str) -> None:
        model.decoder = model.post_quant_conv = None  # more than half of it, and nothing is decoded
        self._model = model.eval().requires_grad_(False)
        self.fingerprint = fingerprint
        self.device: torch.device = model.device
        self.dim: int = 4 * model.config.latent_channels

    @classmethod
    def from_pretrained(cls, name_or_path: str, device: torch.device | str) -> "LatentTeacher":
        """Loads it in fp32; every rank gets a whole copy, since no engine reaches into diffusers.

        Raises:
            ValueError: It cannot be used (see :func:`check_latent_teacher`), or lacks weights.
        """
        folder = check_latent_teacher(name_or_path)
        from diffusers import AutoencoderKL

        model, loading = AutoencoderKL.from_pretrained(folder, output_loading_info=True)
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(
                f"{KEY}: the weights of {name_or_path} lack {len(missing)} tensors of an {_CLASS}, first "
                f"{missing[0]}. Its {CONFIG_FILE} and weights do not belong together: copy or download it again."
            )
        return cls(model.float().to(device), teacher_fingerprint(folder))

    @torch.no_grad()
    def targets(self, images: Tensor, side: int) -> Tensor:
        """A sample of the latents of each image, 2 x 2 of them a token, from the device's default generator.

        Args:
            images: ``[B, 3, S, S]`` in 0..1, on any device: the pixels that the student sees.
            side: Tokens along a side of the student's grid.

        Returns:
            ``[B, side * side, dim]`` in fp32 on the teacher's device, tokens row by row; channels in the order
            (latent channel, row, column).
        """
        config = self._model.config
        size = side * 2 ** len(config.block_out_channels)  # each level but the last halves it, and so do windows of 2
        with torch.autocast(self.device.type, enabled=False):
            pixels = nn.functional.interpolate(
                2 * images.to(self.device, torch.float32) - 1, (size, size), mode="bilinear"
            )
            latents = self._model.encode(pixels).latent_dist.sample()
            packed = nn.functional.pixel_unshuffle((latents - config.shift_factor) * config.scaling_factor, 2)
        return packed.flatten(2).transpose(1, 2)
