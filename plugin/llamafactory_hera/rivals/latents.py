"""A frozen image autoencoder of diffusers, whose latents are ROSS's target.

The computation follows Haochen-Wang409/ross, commit 20ffc6b, ``ross/model/ross_arch.py`` and
``ross/model/pixel_decoder/flux_decoder.py``.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import read_json
from ..hub import CONFIG_FILE
from ..teachers.encoder import KEY, teacher_fingerprint, teacher_folder

_CLASS = "AutoencoderKL"
_WHAT = f"a diffusers {_CLASS} (in a whole pipeline, its sub-folder vae)"


class LatentTeacher:
    """The encoder of a frozen AutoencoderKL. Like ``VisionTeacher`` it is not a ``torch.nn.Module``.

    Attributes:
        dim: Channels of a token's target, which packs 2 x 2 latents.
        fingerprint: Digest of its config and weights; see ``teachers.encoder.teacher_fingerprint``.
    """

    def __init__(self, model: Any, fingerprint: str) -> None:
        model.decoder = model.post_quant_conv = None  # nothing is decoded, and it is more than half of the model
        self._model = model.eval().requires_grad_(False)
        self.fingerprint = fingerprint
        self.device: torch.device = model.device
        self.dim: int = 4 * model.config.latent_channels

    @staticmethod
    def check(name_or_path: str, side: int) -> Path:
        """Checks, without loading them, that a folder or hub id holds a whole AutoencoderKL, and returns its folder.

        Args:
            name_or_path: A folder or a hub id.
            side: Tokens along each side of the student's grid; images are resized, so any number fits.

        Raises:
            ValueError: It does not, diffusers is not installed, or the hub cannot be reached.
        """
        value = str(name_or_path)
        if find_spec("diffusers") is None:
            raise ValueError(f"{KEY}: {value} needs diffusers, which is not installed: pip install diffusers.")
        file = teacher_folder(value, weights=False, what=_WHAT) / CONFIG_FILE
        try:
            config = read_json(file)
            kind = config.get("_class_name")
        except (ValueError, AttributeError) as error:  # AttributeError: the file holds no JSON object
            raise ValueError(f"{KEY}: {error}. Copy or download the teacher {value} again.") from error
        if kind != _CLASS:
            raise ValueError(f"{KEY}: {value} is not an {_CLASS} (its _class_name is {kind!r}). Give {_WHAT}.")
        if missing := [name for name in ("shift_factor", "scaling_factor") if config.get(name) is None]:
            raise ValueError(
                f"{KEY}: {file} has no {' and no '.join(missing)} to normalize the latents with. Give an autoencoder "
                "that has both, such as FLUX.1-dev's."
            )
        return teacher_folder(value, what=_WHAT)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> "LatentTeacher":
        """Loads the autoencoder; every process holds a whole copy, because no engine shards diffusers models.

        Args:
            name_or_path: A folder or a hub id.
            device: The device to compute on.
            dtype: Ignored: the latents are computed in fp32, as in the source.

        Raises:
            ValueError: It cannot be used (see :meth:`check`), or lacks weights.
        """
        folder = cls.check(name_or_path, 0)
        from diffusers import AutoencoderKL

        model, loading = AutoencoderKL.from_pretrained(folder, output_loading_info=True)
        if missing := sorted(loading["missing_keys"]):
            raise ValueError(
                f"{KEY}: the weights of {name_or_path} lack {len(missing)} tensors of an {_CLASS}, the first is "
                f"{missing[0]}. Its {CONFIG_FILE} and weights do not belong together: copy or download it again."
            )
        return cls(model.float().to(device), teacher_fingerprint(folder))

    @torch.no_grad()
    def patch_features(self, images: Tensor, side: int) -> Tensor:
        """Samples the latents of each image, with the default generator of the device; 2 x 2 latents form a token.

        Args:
            images: ``[B, 3, S, S]`` in 0..1, on any device: the pixels that the student sees.
            side: Tokens along each side of the student's grid.

        Returns:
            ``[B, side * side, dim]`` in fp32 on the teacher's device, tokens row by row, channels in the order
            (latent channel, row, column).
        """
        config = self._model.config
        size = side * 2 ** len(config.block_out_channels)  # each level but the last halves it, and so does packing
        with torch.autocast(self.device.type, enabled=False):
            pixels = nn.functional.interpolate(
                2 * images.to(self.device, torch.float32) - 1, (size, size), mode="bilinear"
            )
            latents = self._model.encode(pixels).latent_dist.sample()
            packed = nn.functional.pixel_unshuffle((latents - config.shift_factor) * config.scaling_factor, 2)
        return packed.flatten(2).transpose(1, 2)
