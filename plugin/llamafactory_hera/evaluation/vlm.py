"""lmms-eval's model class for what is trained here, and for every multimodal chat model of transformers."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import GenerationConfig

from .lines import read_json_lines
from .models import default_dtype, load, model_folders


class HeraVLM(lmms):
    """Greedy answers in batches, each as the model gives it alone, by the processor's own chat template.

    Several processes (``torchrun``, ``accelerate launch``) share the samples. An error is raised, not counted as
    wrong.

    Args:
        pretrained: The folder of a model or of an adapter, or a hub id.
        batch_size: Samples in a batch.
        device: Where it runs; by default what accelerate finds.
        dtype: ``auto`` (as stored) or a name of torch's; by default as :func:`~.models.default_dtype` says.
        image_aspect_ratio: ``pad`` makes images squares in the processor's mean color before anything else.
        answers: A file that each batch's answers are appended to, and from where a run that was stopped takes them.
        key: What they depend on beside prompt, images and the task's generation settings, for instance the weights.

    Raises:
        ValueError: There is no such model, or an option is unknown.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        image_aspect_ratio: Literal["none", "pad"] = "none",
        answers: str | os.PathLike | None = None,
        key: str = "",
        max_batch_size: int | None = None,  # lmms-eval passes it
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator(cpu=device == "cpu")
        self.device = torch.device(device) if device else self.accelerator.device
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size: {batch_size} is not a number of samples; give 1 or more.")
        if image_aspect_ratio not in ("none", "pad"):
            raise ValueError(f"image_aspect_ratio: {image_aspect_ratio!r} is unknown; choose none or pad.")
        self.batch_size = int(batch_size)
        self.model, self.processor = load(pretrained, dtype or default_dtype(), self.device)
        self.tokenizer = self.processor.tokenizer
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.ends = [ends] if isinstance(ends, int) else list(ends or [])
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token_id = self.ends[0]
        # nothing else of the stored settings: a repetition penalty or a temperature acts on greedy answers, too
        pad = self.tokenizer.pad_token_id
        self.model.generation_config = GenerationConfig(eos_token_id=self.ends or None, pad_token_id=pad)
        self._pad, self._break = image_aspect_ratio == "pad", ""
        probe = [{"type": "image"}, {"type": "text", "text": "Q"}]
        behind_image = self.prompt([{"role": "user", "content": probe}]).partition("Q")[0][-1:]
        # LLaMA-Factory puts nothing behind an image, and our data do; the makers' templates of some models do not
        trained = any((folder / "trainer_log.jsonl").is_file() for folder in model_folders(pretrained))
        if behind_image != "\n" and trained:
            self._break = "\n"
        self.prompts: dict[int, str] = {}  # of the last task's samples, by number
        self._answers = _Answers(Path(answers) if answers is not None else None, self._rank)
        self._key = f"{key} {image_aspect_ratio}"

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A task's messages as training saw ours: RGB images first, one text, no token that stands for an image."""
        told = []
        for message in messages:
            if other := {part["type"] for part in message["content"]} - {"image", "text"}:
                raise ValueError(f"{', '.join(sorted(other))}: hera_vlm takes text and images alone.")
            text = ""
            for part in (part["text"] for part in message["content"] if part["type"] == "text"):
                # an image may have stood where one text ends and the next begins
                text += (" " if text and not (text[-1:].isspace() or part[:1].isspace()) else "") + part
            for token in ("image_token", "boi_token"):
                text = text.replace(getattr(self.processor, token, None) or "\0", "")
            images = [self._image(part["url"]) for part in message["content"] if part["type"] == "image"]
            parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
            parts.append({"type": "text", "text": self._break * bool(parts) + text})
            told.append({"role": message["role"], "content": parts})
        return told

    def prompt(self, conversation: list[dict[str, Any]]) -> str:
        """The text that a conversation becomes, before its images do."""
        return self.processor.apply_chat_template([conversation], add_generation_prompt=True)[0]

    def inputs(self, conversations: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        """The model's inputs for conversations that all have images, or all have none."""
        return dict(
            self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        )

    def answer_key(self, conversation: list[dict[str, Any]], prompt: str, settings: Mapping[str, Any]) -> str:
        """A digest of all that an answer depends on."""
        digest = hashlib.sha256(json.dumps([self._key, prompt, settings], sort_keys=True).encode())
        for image in (part["image"] for message in conversation for part in message["content"] if "image" in part):
            digest.update(repr(image.size).encode() + image.tobytes())
        return digest.hexdigest()

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers, in the order of the requests."""
        settings = [_settings(request.args[2]) for request in requests]
        # prompts of about the same length share a batch, the longest first
        order = sorted(range(len(requests)), key=lambda i: (repr(settings[i]), -len(requests[i].args[0])))
        batches = [
            (settings[group[0]], group[first : first + self.batch_size])
            for _, rows in groupby(order, key=lambda i: repr(settings[i]))
            for group in [list(rows)]
            for first in range(0, len(group), self.batch_size)
        ]
        keys: dict[int, str] = {}
        # images are read and made inputs beside the model
        workers = max(0, min(4, len(batches) - 1, len(os.sched_getaffinity(0))))
        loader: DataLoader = DataLoader(
            batches,  # type: ignore[arg-type]
            batch_size=None,
            collate_fn=partial(self._prepare, requests),
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,  # a task's functions cannot be sent
        )
        for chosen, batch_keys, parts in tqdm(loader, total=len(batches), desc="answers", disable=self._rank > 0):
            keys |= batch_keys
            for rows, prompts, inputs in parts:
                lines = []
                for row, prompt, ids in zip(rows, prompts, self._generate(inputs, chosen), strict=True):
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    for stop in chosen["until"]:
                        text = text.split(stop)[0]
                    request = requests[row]
                    line = {"key": keys[row], "task": request.task_name, "doc_id": request.doc_id, "prompt": prompt}
                    lines.append(line | {"answer": text.strip(), "ids": ids})
                self._answers.append(lines)
        found = [self._answers.found[keys[i]] for i in range(len(requests))]
        self.prompts = {request.doc_id: line["prompt"] for request, line in zip(requests, found, strict=True)}
        return [line["answer"] for line in found]

    def _prepare(
        self, requests: Sequence[Instance], batch: tuple[dict[str, Any], list[int]]
    ) -> tuple[dict[str, Any], dict[int, str], list[tuple[list[int], list[str], dict]]]:
        """A batch's settings, the keys of all its rows, and inputs of those that have no answer yet."""
        settings, rows = batch
        keys, rest = {}, []
        for row in rows:
            _, to_messages, _, doc_id, task, split = requests[row].args
            try:
                told = self.conversation(to_messages(self.task_dict[task][split][doc_id]))
            except OSError as error:
                raise ValueError(
                    f"sample {doc_id} (from 0) of {task}: its image cannot be read ({error}); replace it, or leave "
                    "its row out."
                ) from error
            prompt = self.prompt(told)
            keys[row] = self.answer_key(told, prompt, settings)
            if keys[row] not in self._answers.found:
                shown = any(part["type"] == "image" for message in told for part in message["content"])
                rest.append((shown, row, prompt, told))
        parts = []
        for with_images in (True, False):  # a processor takes none of either kind among the other
            if same := [each[1:] for each in rest if each[0] == with_images]:
                chosen, prompts, conversations = map(list, zip(*same, strict=True))
                parts.append((chosen, prompts, self.inputs(conversations)))
        return settings, keys, parts

    def _generate(self, inputs: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> list[list[int]]:
        """The tokens of each answer, without the one that ends it."""
        dtype = self.model.dtype
        there = {
            name: value.to(self.device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }
        options = {name: value for name, value in settings.items() if name != "until"}
        with torch.inference_mode():
            ids = self.model.generate(**there, do_sample=False, **options)
        ends = {*self.ends, self.tokenizer.pad_token_id}
        answers = ids[:, there["input_ids"].shape[1] :].tolist()
        return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in answers]

    def _image(self, image: Any) -> Image.Image:
        image = (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")
        if not self._pad:
            return image
        mean = getattr(self.processor.image_processor, "image_mean", None) or [0.5] * 3
        return ImageOps.pad(image, (max(image.size),) * 2, color=tuple(int(255 * value) for value in mean))

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not offered: no task of the suites asks for it."""
        raise NotImplementedError("hera_vlm generates answers; loglikelihood tasks are not offered.")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not offered: no task of the suites asks for it."""
        raise NotImplementedError("hera_vlm generates one answer; tasks of several rounds are not offered.")


def _settings(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What of a task's generation settings a greedy answer depends on."""
    if asked.get("do_sample") and asked.get("temperature", 1.0):
        raise ValueError("do_sample: true: hera_vlm answers greedily; set it to false, or temperature to 0.")
    until = asked.get("until") or []
    return {
        "max_new_tokens": int(asked.get("max_new_tokens") or 1024),
        "num_beams": int(asked.get("num_beams") or 1),
        "until": [until] if isinstance(until, str) else list(until),
    }


class _Answers:
    """Lines of answers by their key, appended to a file, of each process its own; all of them are read."""

    def __init__(self, path: Path | None, rank: int) -> None:
        self.found: dict[str, Mapping[str, Any]] = {}
        self._path = path if path is None or rank == 0 else path.with_name(f"{path.stem}.{rank}{path.suffix}")
        if path is None or self._path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in path.parent.glob(f"{path.stem}*{path.suffix}"):
            self.found |= {line["key"]: line for line in read_json_lines(file)}
        with self._path.open("a+b") as own:  # a line that was cut off ends here
            own.seek(max(0, own.tell() - 1))
            own.write(b"" if own.read() in (b"", b"\n") else b"\n")

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Keeps a batch's answers, on disk before it returns."""
        self.found |= {line["key"]: line for line in lines}
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
                file.flush()
                os.fsync(file.fileno())
