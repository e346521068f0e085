"""The ``hera_vlm`` model class for lmms-eval: a multimodal chat model from transformers, or an adapter for it."""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from ..files import read_json, reading
from ..hub import is_adapter, local_folder, weight_files

# Files that affect an answer, in addition to the weights.
_SETTINGS = re.compile("(config|generation_config|.*processor_config|.*token|chat_template|vocab|merges|adapter_)")


class HeraVLM(lmms):
    """Answers greedily in batches, with prompts from the chat template; each process answers its own samples."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,  # the folder or hub id of a model, or the folder of an adapter
        batch_size: int | str = 1,
        device: str | None = None,  # by default, the device that accelerate chooses
        dtype: str | None = None,  # "auto" (as stored) or a torch dtype; by default float32 on a CPU, else "auto"
        image_aspect_ratio: Literal["none", "pad"] = "none",  # "pad": pads to squares with the processor's mean color
        image_newline: bool = False,  # puts a line break after the images if the chat template does not
        answers: str | None = None,  # a JSONL file of answers to reuse and extend; rank 1 extends <name>.1.jsonl
        key: str = "",  # digest of the weights; an answer is reused for the same key, prompt, images and settings
        max_batch_size: int | None = None,  # unused, but lmms-eval passes it
    ) -> None:
        super().__init__()
        self._pad, self.batch_size = {"none": False, "pad": True}[image_aspect_ratio], int(batch_size)
        self.accelerator = Accelerator(cpu=device == "cpu")
        self.device = torch.device(device) if device else self.accelerator.device
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        dtype = dtype or ("auto" if torch.accelerator.is_available() else "float32")
        self.model, self.processor = _load(pretrained, dtype, self.device)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = self.tokenizer.pad_token_id = ends if isinstance(ends, int) else ends[0]
        # Other stored settings are dropped: a repetition penalty, for example, would change greedy answers.
        self.model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
        self._ends = {pad, *([ends] if isinstance(ends, int) else ends or ())}
        probe = self.prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}])
        self._newline = "\n" * (image_newline and not probe.partition("Q")[0].endswith("\n"))
        self._key, self._answers, self._file = f"{key} {self.model.dtype}", {}, answers and Path(answers)
        if self._file:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            for file in self._file.parent.glob(f"{self._file.stem}*.jsonl"):
                for text in file.read_text(encoding="utf-8", errors="replace").split("\n"):
                    with suppress(KeyError, TypeError, ValueError):  # skips the incomplete line of a killed process
                        line = json.loads(text)
                        self._answers[line["key"]] = line | {"answer": str(line["answer"])}
            self._file = self._file.with_stem(f"{self._file.stem}.{self.rank}") if self.rank else self._file

    def clean(self) -> None:
        """Keeps the model for the next task; lmms-eval would delete it after each task."""

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Arranges messages as in training: RGB images first, then one text without image tokens."""
        arranged = []
        for message in messages:
            if other := {part["type"] for part in message["content"]} - {"image", "text"}:
                raise ValueError(f"{min(other)}: hera_vlm supports only text and images.")
            images = [self._image(part["url"]) for part in message["content"] if part["type"] == "image"]
            texts = [part["text"] for part in message["content"] if part["type"] == "text"]
            text = texts[0] if len(texts) == 1 else " ".join(map(str.strip, texts))
            for token in ("image_token", "boi_token"):
                text = text.replace(getattr(self.processor, token, None) or "\0", "")
            content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
            content.append({"type": "text", "text": self._newline * bool(images) + text})
            arranged.append({"role": message["role"], "content": content})
        return arranged

    def prompt(self, conversation: list[dict[str, Any]]) -> str:
        """Renders a conversation as text that has one token per image."""
        return self.processor.apply_chat_template([conversation], add_generation_prompt=True)[0]

    def inputs(self, conversations: Sequence[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        """Creates the model's inputs from conversations that either all have images or all have none."""
        form = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "processor_kwargs": {"padding": True}}
        return dict(self.processor.apply_chat_template(list(conversations), add_generation_prompt=True, **form))

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Returns the answers in the order of the requests."""
        # Texts of similar length need little padding. The longest come first, so that memory runs out early or never.
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[2]), -len(requests[i].args[0])))
        batches: Any = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warns if a process forks
        # Workers prepare batches while the model generates. They are forked: a task's functions cannot be pickled.
        workers = max(0, min(4, len(batches) - 1, len(os.sched_getaffinity(0))))
        workers *= shutil.disk_usage("/dev/shm").free >= 1 << 30  # with Docker's 64 MB, workers could hang
        options: Any = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
        loader = DataLoader(batches, None, collate_fn=partial(self._prepare, requests), **options)
        answers: dict[int, str] = {}
        for lines, parts in tqdm(loader, total=len(batches), desc="answers", disable=self.rank > 0):
            for rows, settings, inputs in parts:
                for row, ids in zip(rows, self._generate(inputs, settings["max_new_tokens"]), strict=True):
                    text = self.tokenizer.decode(ids, skip_special_tokens=True)
                    for stop in settings["until"]:
                        text = text.split(stop)[0]
                    lines[row] |= {"answer": text.strip(), "ids": ids}
                if self._file:
                    # a killed process may have left its last line incomplete; the first line break ends it
                    with self._file.open("a", encoding="utf-8") as file:
                        file.writelines("\n" + json.dumps(lines[row], ensure_ascii=False) for row in rows)
            answers |= {row: line["answer"] for row, line in lines.items()}
        return [answers[row] for row in range(len(requests))]

    def _prepare(self, requests: Sequence[Instance], batch: Sequence[int]) -> tuple[dict[int, dict], list[tuple]]:
        """Returns each sample's line of the answers file, and rows, settings and inputs of the unanswered samples.

        The unanswered samples are grouped by their settings, and by whether they have images.
        """
        lines: dict[int, dict[str, Any]] = {}
        groups = defaultdict(list)
        for row in batch:
            _, messages_of, generation, doc_id, task, split = requests[row].args
            try:
                conversation = self.conversation(messages_of(self.task_dict[task][split][doc_id]))
            except OSError as error:
                raise ValueError(f"sample {doc_id} (from 0) of {task}: replace its image ({error}).") from error
            if generation.get("do_sample") and generation.get("temperature", 1.0):
                raise ValueError("do_sample: true is not supported by hera_vlm; set it to false, or temperature to 0.")
            n_tokens, until = int(generation.get("max_new_tokens") or 1024), generation.get("until") or []
            settings = {"max_new_tokens": n_tokens, "until": [until] if isinstance(until, str) else list(until)}
            prompt = self.prompt(conversation)
            digest = hashlib.sha256(repr([self._key, prompt, settings]).encode())
            images = [part["image"] for message in conversation for part in message["content"] if "image" in part]
            for image in images:
                digest.update(repr(image.size).encode() + image.tobytes())
            line = {"key": digest.hexdigest(), "task": task, "doc_id": doc_id, "prompt": prompt}
            lines[row] = self._answers.get(line["key"], line)
            if lines[row] is line:  # processors cannot mix samples with and without images
                groups[bool(images), repr(settings)].append((row, settings, conversation))
        parts = [tuple(zip(*group, strict=True)) for group in groups.values()]
        return lines, [(rows, settings[0], self.inputs(group)) for rows, settings, group in parts]

    def _generate(self, inputs: Mapping[str, torch.Tensor], n_tokens: int) -> list[list[int]]:
        """Returns the tokens of each answer, without its end token."""
        dtype = self.model.dtype
        moved = {name: x.to(self.device, dtype if x.is_floating_point() else None) for name, x in inputs.items()}
        with torch.inference_mode():
            ids = self.model.generate(**moved, do_sample=False, max_new_tokens=n_tokens)
        answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
        return [list(takewhile(lambda token: token not in self._ends, answer)) for answer in answers]

    def _image(self, image: Any) -> Image.Image:
        image = (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")
        mean = getattr(self.processor.image_processor, "image_mean", None) or [0.5] * 3
        color = tuple(int(255 * value) for value in mean)
        return ImageOps.pad(image, (max(image.size),) * 2, color=color) if self._pad else image

    def loglikelihood(self, requests: Sequence[Instance]) -> Any:
        """Refuses tasks that need anything except one generated answer."""
        raise NotImplementedError("hera_vlm only runs tasks with output_type: generate_until.")

    generate_until_multi_round = loglikelihood


def model_folders(name: str) -> list[Path]:
    """Finds the folder of a model (by path or hub id), or the folders of an adapter and of its base model."""
    folder, key = Path(name).expanduser(), "base_model_name_or_path"
    if not is_adapter(folder):
        return [local_folder(name, "MODEL", "a multimodal model, or the folder of an adapter")]
    with reading(folder / "adapter_config.json", "the configuration of an adapter"):
        base = read_json(folder / "adapter_config.json").get(key) or ""
    what = "the model that the adapter was trained on, as a hub id or a path from the working directory"
    return [folder, local_folder(base, f"{key} of the adapter {folder}", what)]


def weights_digest(folders: Sequence[Path]) -> str:
    """Computes a digest of the files that affect answers: weights, adapter, tokenizer, chat template and settings."""
    digest = hashlib.sha256()
    for folder in folders:
        files = [path for path in folder.iterdir() if path.is_file() and _SETTINGS.match(path.name)]
        for path in sorted({*files, *(weight_files(folder) if folder == folders[-1] else ())}):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _load(name: str, dtype: str, device: Any) -> tuple[Any, Any]:
    """Loads a model with its adapter merged, and the processor of the adapter or else of the base model."""
    *adapters, base = folders = model_folders(name)
    source = next((folder for folder in folders if any(folder.glob("*processor_config.json"))), base)
    processor: Any = AutoProcessor.from_pretrained(source)
    for attribute in ("image_processor", "chat_template"):
        if getattr(processor, attribute, None) is None:
            raise ValueError(f"MODEL: {source} has no {attribute.replace('_', ' ')}; give a multimodal chat model.")
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "output_loading_info": True}
    loaded: Any = AutoModelForImageTextToText.from_pretrained(base, **options)
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):  # transformers would fill them with random numbers
        raise ValueError(f"MODEL: {base} lacks {len(missing)} weights, such as {missing[0]}; copy it again.")
    for folder in adapters:
        from peft import PeftModel

        with warnings.catch_warnings():  # PEFT would only warn, and fill the missing weights with random numbers
            warnings.filterwarnings("error", "Found missing adapter keys")
            model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    if broken := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise ValueError(f"MODEL: {name} has weights that are NaN or infinity, such as {broken[0]}; copy it again.")
    return model.eval(), processor
