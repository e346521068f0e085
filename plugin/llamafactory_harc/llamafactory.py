"""HARC in LLaMA-Factory (the host): ``stage: harc``, its data, and the command ``harc-directions``."""

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from llamafactory.data import loader
from llamafactory.model import load_model
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from transformers import DataCollatorForSeq2Seq

from llamafactory_hera.files import write_text
from llamafactory_hera.integrations.llamafactory.checks import check_folders, refuse_keys
from llamafactory_hera.integrations.llamafactory.inputs import Samples, has_answer
from llamafactory_hera.integrations.llamafactory.recipe import (
    NOT_TRAINING,
    HostArguments,
    host_arguments,
    host_words,
    named_output,
    read_values,
)
from llamafactory_hera.integrations.llamafactory.workflow import run_replaced
from llamafactory_hera.integrations.messages import show_messages
from llamafactory_hera.selection.run_yaml import RecipeFile
from llamafactory_hera.training.checkpoint import checkpoint_of

from .config import AUTO, HarcConfig
from .coupler import Coupler
from .data import KINDS, HarcCollator, named_kind, read_rows, template_tail
from .directions import DIRECTIONS, FOLDER
from .trainer import HarcTrainerMixin

#: Key -> why HARC does not work with it.
_REFUSED = {
    "enable_liger_kernel": "fused losses compute no logits, which the KL term compares",
    "packing": "several samples in one row have no single prompt and response",
    "streaming": "batches have a fixed mixture of classes",
    "train_on_prompt": "the response begins at the first label",
    "use_unsloth": "it replaces the layers that are read",
    "use_unsloth_gc": "its checkpointing cannot carry what is read",
    "val_size": "the data have classes; evaluate after the run",
    "eval_dataset": "the data have classes; evaluate after the run",
    "tokenized_path": "tokenized data have lost the classes",
}
_CURVES = ["lm_loss", "harc_coupling", "harc_response", "harc_kl"]
_CURVES += [f"harc_cos_{kind}_{place}" for kind in ("harmful", "benign") for place in ("prompt", "response")]


class _HarcSftTrainer(HarcTrainerMixin, CustomSeq2SeqTrainer):
    """The host's SFT trainer with HARC."""


@host_words()
def run_harc(workflow: ModuleType, run_sft: Callable[..., None], *arguments: Any) -> None:
    """Trains with HARC; without ``do_train`` it runs the host's SFT workflow unchanged."""
    host = HostArguments(*arguments[:4])
    if not host.training.do_train:
        return run_sft(*arguments)
    show_messages(logging.getLogger("llamafactory"))
    config = _checked(host)
    host.training.resume_from_checkpoint = checkpoint_of(host.training)
    samples = _Samples(host, config)
    rows = samples.encoded()
    read_rows(rows, samples.tail(), config)  # refuses data before the weights are loaded

    def make_trainer(*args: Any, **kwargs: Any) -> _HarcSftTrainer:
        return _HarcSftTrainer(*args, harc=config, tail=samples.tail(), **kwargs)

    plot_loss = workflow.plot_loss
    replacements = {
        "get_dataset": lambda *_, **__: {"train_dataset": rows},
        "plot_loss": lambda folder, keys: plot_loss(folder, keys=[*keys, *_CURVES]),
    }
    run_replaced(workflow, run_sft, arguments, make_trainer, replacements)


@host_words()
def write_directions(recipe: str, overrides: Sequence[str] = ()) -> None:
    """Extracts the directions of a recipe's model, and writes them and a ``run.yaml`` into ``output_dir/harc``."""
    file = RecipeFile.read(recipe)
    values, changes = read_values(file, overrides)
    folder = named_output(values, "saves/harc") / FOLDER
    run = file.with_keys({**changes, "stage": "harc", "harc_directions": str(folder / DIRECTIONS)})
    untrained = {"stage": "harc", "harc_directions": AUTO, "adapter_name_or_path": None}  # the base model
    host = host_arguments(values | NOT_TRAINING | untrained)
    config = _checked(host)
    samples = _Samples(host, config)
    rows = read_rows(samples.encoded(), samples.tail(), config)
    model = load_model(samples.tokenizer, host.model, host.finetuning, is_trainable=False)
    collate = HarcCollator(DataCollatorForSeq2Seq(samples.tokenizer, pad_to_multiple_of=8), len(samples.tail()))
    coupler = Coupler(model.to(host.training.device), config, rows.extract, collate, folder.parent)
    coupler.base = coupler.extract(host.training.device)
    coupler.save_directions()
    write_text(folder / "run.yaml", f"# {recipe} with the directions of its base model\n\n{run}")
    print("wrote:", *(folder / name for name in (DIRECTIONS, "harc.json", "directions.png", "run.yaml")), sep="\n  ")
    print(f"next:\n  llamafactory-cli train {folder / 'run.yaml'}")


def _checked(host: HostArguments) -> HarcConfig:
    """Reads the keys, and refuses settings before data and weights are read."""
    refuse_keys(host, _REFUSED, "stage: harc")
    if host.finetuning.finetuning_type != "lora":
        raise ValueError(
            f"finetuning_type: {host.finetuning.finetuning_type} trains no adapter, and HARC compares the model with "
            "itself without its adapter; set finetuning_type: lora."
        )
    check_folders(host.training.output_dir, host)
    return HarcConfig.from_keys(host.finetuning)


class _Samples(Samples):
    """The training rows with their class, which the host's conversion would drop, and without truncation."""

    def __init__(self, host: HostArguments, config: HarcConfig) -> None:
        self._column = config.column
        data = copy.deepcopy(host.data)
        data.cutoff_len = 1 << 20  # HARC keeps the end of a prompt, and the host its beginning
        with self._keeping_classes():
            super().__init__(host._replace(model=copy.deepcopy(host.model), data=data), 0)

    @contextmanager
    def _keeping_classes(self) -> Any:
        align = loader.align_dataset

        def align_with_class(dataset: Any, attributes: Any, *args: Any) -> Any:
            kinds = [named_kind(attributes.dataset_name)] * len(dataset)
            if self._column in dataset.column_names:
                kinds = list(dataset[self._column])
            elif kinds[:1] == [None]:
                raise ValueError(
                    f"harc_column: {attributes.dataset_name} has no column {self._column}, and its name contains none "
                    f"of {', '.join(KINDS)}; add the column, or rename the dataset."
                )
            return align(dataset, attributes, *args).add_column(self._column, kinds)

        loader.align_dataset = align_with_class
        try:
            yield
        finally:
            loader.align_dataset = align

    def encoded(self) -> list[dict[str, Any]]:
        """Encodes all rows as the host does."""
        rows = []
        for number, row in enumerate(self.rows):
            features = self.encode_with(row, self.processor) if has_answer(row) else None
            if features is None:
                raise ValueError(f"dataset: row {number} ({row[self._column]}) has no response; every row needs one.")
            rows.append({**features, self._column: row[self._column]})
        return rows

    def tail(self) -> list[int]:
        """Returns the tokens of the host's template between the user's text and the response."""

        def render(text: str) -> list[int]:
            messages = [{"role": role, "content": text} for role in ("user", "assistant")]
            return self.template.encode_oneturn(self.tokenizer, messages)[0]

        return template_tail(render)
