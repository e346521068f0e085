"""Where an image's tokens are, found one by one, and models whose images are no fixed square grid."""

import pytest
import torch

from llamafactory_hera.integrations.llamafactory.visual_tokens import grid_side, image_token_id, token_positions
from tests.tiny_models import VLMS, vlm

IMAGE, PER_IMAGE = 9, 4


def sequence(*parts: object) -> list[int]:
    """Text tokens by number, an image by ``"image"``."""
    return [token for part in parts for token in ([IMAGE] * PER_IMAGE if part == "image" else [part])]


def test_the_tokens_of_the_image_that_the_teacher_sees() -> None:
    rows = [
        sequence(1, "image", 2, 3),
        sequence("image", 4, "image", 5),
        sequence(1, 2, "image", "image"),
        sequence(1, 2, 3),
    ]
    shown = [(0, 1), (1, 2), (0, 2), (0, 0)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    attended = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    found = token_positions(ids, attended, torch.tensor(shown), IMAGE, PER_IMAGE)
    for row, (index, count), positions in zip(rows, shown, found.tolist(), strict=True):
        places = [place for place, token in enumerate(row) if token == IMAGE]
        if count:
            assert positions == places[index * PER_IMAGE : (index + 1) * PER_IMAGE]
    assert found.max() < width  # a sample without an image gives some position


def test_the_dummy_image_of_the_host_is_none() -> None:
    ids = torch.tensor([sequence(1, 2, "image")])
    attended = torch.tensor([[1, 1, 0, 0, 0, 0]])
    token_positions(ids, attended, torch.tensor([[0, 0]]), IMAGE, PER_IMAGE)
    with pytest.raises(ValueError, match="1 images has 0 image tokens in the place of 4"):
        token_positions(ids, attended, torch.tensor([[0, 1]]), IMAGE, PER_IMAGE)


def test_tokens_that_were_cut_off_are_named() -> None:
    ids = torch.tensor([sequence("image", 1, "image")[:-1]])
    with pytest.raises(ValueError, match=r"^cutoff_len: a sample with 2 images has 7 image tokens in the place of 8"):
        token_positions(ids, None, torch.tensor([[1, 2]]), IMAGE, PER_IMAGE)


@pytest.mark.parametrize("name", VLMS)
def test_only_models_with_a_fixed_square_grid(name: str) -> None:
    config = vlm(name).config
    if config.model_type == "llava":
        assert grid_side(config, "viral") ** 2 == PER_IMAGE
        assert image_token_id(config) == config.image_token_index
        config.vision_config.image_size = (16, 32)
        with pytest.raises(ValueError, match=r"hera_objective: viral needs .* images are 16 x 32 pixels; use"):
            grid_side(config, "viral")
    else:
        with pytest.raises(ValueError, match=rf"hera_objective: viral needs .* {config.model_type!r} models are none"):
            grid_side(config, "viral")
