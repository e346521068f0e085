"""HARC in LLaMA-Factory (the host): ``stage: harc``, its data, and the ``harc-directions`` command."""

import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

from llamafactory.data import loader
from llamafactory.model import load_model
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer

from llamafactory_hera.files import write_text
from llamafactory_hera.integrations.llamafactory import recipe as recipes
from llamafactory_hera.integrations.llamafactory.checks import UNREADABLE, check_folders, refuse_keys
from llamafactory_hera.integrations.llamafactory.inputs import Samples, has_answer
from llamafactory_hera.integrations.llamafactory.workflow import run_replaced
from llamafactory_hera.integrations.messages import show_messages
from llamafactory_hera.selection.run_yaml import RecipeFile
from llamafactory_hera.training.checkpoint import checkpoint_of

from .config import AUTO, HarcConfig
from .coupler import Coupler
from .data import KINDS, HarcCollator, read_rows, template_tail
from .directions import DIRECTIONS, FOLDER
from .trainer import HarcTrainerMixin

#: Keys that do not work with HARC, and the reasons.
_REFUSED = UNREADABLE | {
    "enable_liger_kernel": "fused losses skip the logits that the KL term compares",
    "packing": "a packed row has no single prompt and response",
    "streaming": "batches have a fixed mixture of classes",
    "train_on_prompt": "the first label marks the response",
    "use_unsloth_gc": "Unsloth's checkpointing hides activations from HARC",
    **dict.fromkeys(("val_size", "eval_dataset", "tokenized_path"), "such rows have no class; evaluate after the run"),
}
_CURVES = ["lm_loss", "harc_coupling", "harc_response", "harc_kl"]
_CURVES += [f"harc_cos_{kind}_{place}" for kind in ("harmful", "benign") for place in ("prompt", "response")]


class _HarcSftTrainer(HarcTrainerMixin, CustomSeq2SeqTrainer):
    """The host's SFT trainer with HARC."""


@recipes.host_words()
def run_harc(workflow: ModuleType, run_sft: Callable[..., None], *arguments: Any) -> None:
    """Trains with HARC, or runs the host's SFT workflow unchanged without ``do_train``."""
    host = recipes.HostArguments(*arguments[:4])
    if not host.training.do_train:
        return run_sft(*arguments)
    show_messages(logging.getLogger("llamafactory"))
    host.training.resume_from_checkpoint = checkpoint_of(host.training)
    config = checked(host)
    samples = KindSamples(host, config)
    rows, plot_loss = samples.encoded(), workflow.plot_loss
    read_rows(rows, samples.tail, config)  # reports bad data before the weights are loaded
    replacements = {
        "get_dataset": lambda *_, **__: {"train_dataset": rows},
        "plot_loss": lambda folder, keys: plot_loss(folder, keys=[*keys, *_CURVES]),
    }
    make_trainer = partial(_HarcSftTrainer, harc=config, tail=samples.tail)
    run_replaced(workflow, run_sft, arguments, make_trainer, replacements)


@recipes.host_words()
def write_directions(recipe: str, overrides: Sequence[str] = ()) -> None:
    """Extracts the directions of a recipe's base model into ``output_dir/harc``, and writes a ``run.yaml`` there."""
    file = RecipeFile.read(recipe)
    values, changes = recipes.read_values(file, overrides)
    folder = recipes.named_output(values, "saves/harc") / FOLDER
    run = file.with_keys({**changes, "stage": "harc", "harc_directions": str(folder / DIRECTIONS)})
    base: dict[str, Any] = {"stage": "harc", "harc_directions": AUTO, "adapter_name_or_path": None}
    host = recipes.host_arguments(values | recipes.NOT_TRAINING | base)
    config, device = checked(host), host.training.device
    samples = KindSamples(host, config)
    extract, _ = read_rows(samples.encoded(), samples.tail, config)
    model = load_model(samples.tokenizer, host.model, host.finetuning, is_trainable=False).to(device)
    coupler = Coupler(model, config, extract, HarcCollator(samples.tokenizer, len(samples.tail)), folder.parent)
    coupler.base = coupler.extract(device)
    coupler.save_directions()
    write_text(folder / "run.yaml", f"# {recipe} with the directions of its base model\n\n{run}")
    print(f"wrote {folder}; next: llamafactory-cli train {folder / 'run.yaml'}")


def checked(host: recipes.HostArguments) -> HarcConfig:
    """Reads the keys, and refuses bad ones before data and weights are read."""
    refuse_keys(host, _REFUSED, "stage: harc")
    if (tuning := host.finetuning.finetuning_type) != "lora":
        raise ValueError(f"finetuning_type: {tuning} trains no adapter that HARC could switch off; set lora.")
    check_folders(host.training.output_dir, host)
    return HarcConfig.from_keys(host.finetuning)


class KindSamples(Samples):
    """The training rows of a host run, untruncated and with their class, which the host's conversion drops."""

    def __init__(self, host: recipes.HostArguments, config: HarcConfig) -> None:
        self._column, align = config.column, loader.align_dataset
        data = copy.deepcopy(host.data)
        data.cutoff_len = 1 << 20  # HARC truncates rows itself

        def align_with_class(dataset: Any, attributes: Any, *args: Any) -> Any:
            name = attributes.dataset_name
            kinds = [kind for kind in KINDS if kind in name.lower()] * len(dataset)
            if self._column in dataset.column_names:
                kinds = list(dataset[self._column])
            if len(kinds) != len(dataset):
                reason = f"its name needs exactly one of {', '.join(KINDS)}; add the column, or rename the dataset"
                raise ValueError(f"harc_column: {name} has no `{self._column}` column, so {reason}.")
            return align(dataset, attributes, *args).add_column(self._column, kinds)

        loader.align_dataset = align_with_class
        try:
            super().__init__(host._replace(model=copy.deepcopy(host.model), data=data), 0)
        finally:
            loader.align_dataset = align
        self.tail = template_tail(self._prompt)

    def _prompt(self, text: str) -> list[int]:
        messages = [{"role": role, "content": text} for role in ("user", "assistant")]
        return self.template.encode_oneturn(self.tokenizer, messages)[0]

    def encoded(self) -> list[dict[str, Any]]:
        """Encodes all rows as the host does."""
        rows = []
        for number, row in enumerate(self.rows):
            features = self.encode_with(row, self.processor) if has_answer(row) else None
            if features is None:
                raise ValueError(f"dataset: row {number} ({row[self._column]}) has no response; add a response.")
            rows.append({**features, self._column: row[self._column]})
        return rows
