"""The teacher's view of a batch: put in by the collator, in the loader's workers; made into features in the step."""

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..alignment.gather import of_all, rank, world_size
from ..config import HeraConfig
from ..heads.pooling import check_image_tokens
from ..teachers.cache import FeatureCache
from ..teachers.checkpoint import check_teacher
from ..teachers.encoder import TeacherProcessor, VisionTeacher, check_grid, normalization
from ..teachers.fill import fill_cache
from ..teachers.images import (
    KEY_BYTES,
    ImageLike,
    ShownImages,
    decoded_key,
    images_by,
    load_image,
    sample_images,
    shown_image,
)
from ..teachers.latents import LatentTeacher

logger = logging.getLogger("llamafactory_hera")

#: Where the teacher's feature of a sample comes from.
NO_IMAGE, CACHED, PIXELS = 0, 1, 2

#: Every added tensor's name starts with this; it is taken out before the model sees the batch.
PREFIX = "hera_"


@dataclass(eq=False)
class HeraCollator:
    """Wraps a collator; images are decoded where it runs.

    Every tensor it adds but one has the batch as its first axis: ``hera_source [B]`` (one of the three above), and
    where needed ``hera_keys [B, 16]``, ``hera_features [B, D_teacher]`` (the bits of float16, as int16: DeepSpeed
    casts what is floating point), and either ``hera_pixels [B, 3, h, w]`` or ``hera_image [B, 2]`` (which image of the
    sample the teacher sees, of how many). ``hera_rows [P]`` are the rows from ``PIXELS``: on a device, finding them
    would make the host wait.

    Args:
        collate: The loop's own collator.
        processor: The teacher's image processor; None where it sees the batch's own pixels.
        one_image: Samples with several images are refused.
        cache: Features computed before, or None.
        image_index: Which image of a sample with several; clamped to what there is.
        images_of: From a row of the dataset to its images.
        drop: Columns that ``collate`` must not see.
        decode: Makes of a row, whose images are as they are stored, what ``collate`` and the teacher see.
        tokens: The placeholder of an image and how many it has, where these are read: batches with others are refused.
    """

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    processor: TeacherProcessor | None
    cache: FeatureCache | None = None
    image_index: int = 0
    one_image: bool = False
    images_of: Callable[[Any], list[ImageLike]] = sample_images
    drop: tuple[str, ...] = ()
    decode: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    tokens: tuple[int, int] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Collates ``rows`` and adds the teacher's tensors."""
        # first: a collator may take the images out of the rows, and give a batch without any a dummy image
        stored = [images_by(self.images_of, row) for row in rows]
        if self.one_image:
            check_one_image(max(map(len, stored)))
        shown = [(shown_image(len(images), self.image_index), len(images)) for images in stored]
        decoded = stored
        if self.decode is not None:
            rows = [self.decode(row) for row in rows]
            decoded = [images_by(self.images_of, row) for row in rows]
        pairs = (
            (images[index], files[index]) if count else None
            for images, files, (index, count) in zip(decoded, stored, shown, strict=True)
        )
        teacher = self._teacher_inputs(list(pairs))
        if self.processor is None:
            teacher["hera_image"] = torch.tensor(shown)
        if self.drop:
            rows = [{name: value for name, value in row.items() if name not in self.drop} for row in rows]
        batch = self.collate(rows)
        if self.tokens is not None:
            check_image_tokens(batch["input_ids"], batch.get("attention_mask"), teacher["hera_image"], *self.tokens)
        return {**batch, **teacher}

    def _teacher_inputs(self, images: list[tuple[ImageLike, ImageLike] | None]) -> dict[str, Tensor]:
        """Of each row's image, or None: as it is seen, and as it is stored."""
        source = torch.full((len(images),), NO_IMAGE, dtype=torch.uint8)
        pending = {row: pair for row, pair in enumerate(images) if pair is not None}
        source[list(pending)] = PIXELS
        batch = {"hera_source": source}
        if self.cache is not None and pending:
            keys = [decoded_key(image, file) for image, file in pending.values()]
            batch["hera_keys"] = torch.zeros(len(images), KEY_BYTES, dtype=torch.uint8)
            batch["hera_keys"][list(pending)] = torch.tensor([list(key) for key in keys], dtype=torch.uint8)
            known = {row: f for row, f in zip(pending, self.cache.get(keys), strict=True) if f is not None}
            if known:
                batch["hera_features"] = torch.zeros(len(images), self.cache.dim, dtype=torch.int16)
                for row, feature in known.items():
                    batch["hera_features"][row] = feature.view(torch.int16)
                source[list(known)] = CACHED
            pending = {row: image for row, image in pending.items() if row not in known}
        if pending:
            batch["hera_rows"] = torch.tensor(list(pending))
        if pending and self.processor is not None:
            batch["hera_pixels"] = torch.zeros(len(images), 3, *self.processor.pixel_size)
            for row, (image, _) in pending.items():
                batch["hera_pixels"][row] = self.processor(load_image(image))
        return batch


def check_one_image(most: int) -> None:
    """Refuses samples with several images, of which the largest has ``most``."""
    if most > 1:
        raise ValueError(
            f"dataset: a sample has {most} images, and this hera_objective takes one; leave such samples out."
        )


@dataclass(frozen=True)
class StudentImages:
    """The pixels that the student sees, for a teacher that must see the same place at the same token.

    Args:
        side: Tokens along a side of an image's grid.
        processor: The student's image processor.
        covered: Pixels along a side that the tower's patches cover (378 of 384 at 14); 0 takes all.
    """

    side: int
    processor: Any
    covered: int = 0
    _held: dict[torch.device, tuple[Tensor, ...]] = field(default_factory=dict, init=False, compare=False)

    def pixels(self, batch: dict[str, Any], image: Tensor) -> Tensor:
        """Of a batch's ``pixel_values`` the chosen image of each sample, ``[B, 3, S, S]`` in [0, 1].

        ``image`` is ``hera_image``; a sample without one has any.
        """
        values = batch.get("pixel_values")
        if values is None:  # text alone
            return torch.zeros(len(image), 3, 1, 1, device=image.device)
        index, count = image.unbind(dim=1)
        place = (count.cumsum(0) - count + index).clamp(max=len(values) - 1)
        mean, std = self._normalization(values.device)
        end = self.covered or values.shape[-1]
        return (values[place][..., :end, :end].float() * std + mean).clamp(0, 1)

    def _normalization(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._held:  # copied once: a copy makes the host wait
            self._held[device] = tuple(each.to(device) for each in normalization(self.processor))
        return self._held[device]

    def fingerprint(self, teacher: str) -> str:
        """A digest of a teacher's fingerprint, the grid, and the settings of the student's processor."""
        described = f"{teacher} {self.side} {self.covered} {self.processor.to_json_string()}"
        return hashlib.sha256(described.encode()).hexdigest()


class TeacherFeatures:
    """The teacher of a run with its cache: from what the collator added to features, as an objective views them.

    Args:
        config: The ``hera_*`` keys.
        device: Of the teacher.
        dtype: Compute type of a vision model.
        student: For an objective on visual tokens.
        latents: The teacher is an autoencoder.
    """

    def __init__(
        self,
        config: HeraConfig,
        device: torch.device,
        dtype: torch.dtype,
        student: StudentImages | None = None,
        latents: bool = False,
    ) -> None:
        self.student = student
        self.encoder: VisionTeacher | LatentTeacher
        if latents:
            self.encoder = LatentTeacher.from_pretrained(config.teacher, device)
        else:
            if student is not None:
                check_grid(check_teacher(config.teacher), student.side)
            self.encoder = VisionTeacher.from_pretrained(config.teacher, device=device, dtype=dtype)
        self.cache: FeatureCache | None = None
        if config.teacher_cache:
            fingerprint, size = self.encoder.fingerprint, self.encoder.dim
            if student is not None:
                fingerprint, size = student.fingerprint(fingerprint), size * student.side**2
            self.cache = FeatureCache(config.teacher_cache, fingerprint, size)
        self._waiting: list[tuple[Tensor, Tensor, Any]] = []  # keys and features on their way to the host, and when

    def features(self, inputs: dict[str, Tensor], pixels: Tensor | None = None) -> Tensor:
        """Features of a batch's samples ``[B, D_teacher]``, or of its tokens ``[B, T, D_teacher]``; 0: no image.

        NaN where what the collator added was lost on the way, which only the device knows.

        Args:
            inputs: What the collator added.
            pixels: Of :meth:`StudentImages.pixels`, for the tokens.
        """
        source, rows = inputs["hera_source"], inputs.get("hera_rows")
        if pixels is None:
            pixels = inputs.get("hera_pixels")
        tokens = 1 if self.student is None else self.student.side**2
        features = torch.full((len(source), tokens * self.encoder.dim), torch.nan, device=source.device)
        features = torch.where((source == NO_IMAGE).unsqueeze(1), 0.0, features)
        if "hera_features" in inputs:
            held = inputs["hera_features"].view(torch.float16).to(features)
            features = torch.where((source == CACHED).unsqueeze(1), held, features)
        self.flush(wait=False)
        if pixels is not None and rows is not None:
            features = features.index_copy(0, rows, self._remember(inputs, self._compute(pixels[rows]).flatten(1)))
        return features if self.student is None else features.unflatten(1, (tokens, -1))

    def of_dataset(
        self, dataset: Any, images_of: Callable[[Any], list[ImageLike]], config: HeraConfig, num_workers: int = 0
    ) -> tuple[NDArray[np.bool_], Callable[[NDArray[np.intp]], Tensor]]:
        """Which rows have an image ``[N]``, and what gives the features ``[n, D]`` of the images of such rows.

        Each process reads the images of its share and computes what the cache lacks; all must call it.

        Raises:
            ValueError: An image is missing or corrupt; names the file. When features are asked for: they are gone.
        """
        cache, encoder = self.cache, self.encoder
        assert cache is not None
        assert isinstance(encoder, VisionTeacher)
        if rank() == 0:
            logger.info(f"HeRA | batches: reading the images of {len(dataset)} rows, for their neighbors")
        mine = [row for row in range(rank(), len(dataset), world_size()) if images_by(images_of, dataset[row])]
        images = ShownImages(dataset, images_of, config.image_index, mine)
        found = fill_cache(encoder, cache, images, config.select.batch_size, num_workers)
        shown, keys = np.zeros(len(dataset), dtype=bool), np.zeros((len(dataset), KEY_BYTES), dtype=np.uint8)
        for rows, joined in of_all((mine, b"".join(found))):
            shown[rows], keys[rows] = True, np.frombuffer(joined, np.uint8).reshape(-1, KEY_BYTES)
        cache.refresh()

        def features_of(rows: NDArray[np.intp]) -> Tensor:
            features = cache.get([key.tobytes() for key in keys[rows]])
            held = [feature for feature in features if feature is not None]
            if len(held) < len(rows):
                raise ValueError(
                    f"hera_teacher_cache: {cache.folder} lacks the features of {len(rows) - len(held)} images, which "
                    "it held when the run began; let all machines share it, and start or resume the run to fill it."
                )
            return torch.stack(held)

        return shown, features_of

    def _compute(self, pixels: Tensor) -> Tensor:
        if self.student is not None:
            return self.encoder.targets(pixels, self.student.side)
        assert isinstance(self.encoder, VisionTeacher)
        return self.encoder.encode(pixels)

    def _remember(self, inputs: dict[str, Tensor], computed: Tensor) -> Tensor:
        """Sends features to the cache and returns them rounded as they will be read: a resumed run sees the same."""
        if self.cache is None:
            return computed
        rounded, arrived = computed.half(), None
        keys = inputs["hera_keys"][inputs["hera_rows"]]
        keys, features = (each.to("cpu", non_blocking=True) for each in (keys, rounded))
        if rounded.device.type != "cpu":
            arrived = torch.get_device_module(rounded.device).Event()
            arrived.record()
        self._waiting.append((keys, features, arrived))
        return rounded.to(computed)

    def flush(self, wait: bool = True) -> None:
        """Writes the features that wait in memory; without ``wait`` it only takes in those that are on the host.

        A cache that cannot be written is no reason to stop.
        """
        if self.cache is None:
            return
        try:
            while self._waiting and (wait or self._waiting[0][2] is None or self._waiting[0][2].query()):
                keys, features, arrived = self._waiting.pop(0)
                if arrived is not None:
                    arrived.synchronize()
                self.cache.put([bytes(key) for key in keys.numpy()], features)
            if wait:
                self.cache.flush()
        except OSError as error:
            logger.warning(
                f"hera_teacher_cache: {self.cache.folder} cannot be written ({error}); the run goes on and computes "
                "the features that are not in it."
            )
            self.cache = None
