"""The coupling of one run: extracts and refreshes the directions, chooses layers, and computes the weighted term.

:class:`Coupler` is a ``Method`` of ``llamafactory_hera.integrations.method_trainer``; any training loop can use it.
"""

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamafactory_hera.distributed import rank, world_size
from llamafactory_hera.files import read_json, reading, write_json, write_safetensors
from llamafactory_hera.heads.capture import LayerCapture
from llamafactory_hera.heads.families import head_layout, model_config
from llamafactory_hera.heads.hooks import Hooks
from llamafactory_hera.keys import changes
from llamafactory_hera.selection.select import evaluating
from llamafactory_hera.training.watch import RunningMeans

from . import directions as geometry
from .config import AUTO, HarcConfig
from .data import PREFIX, HarcCollator, Row, reading_mask
from .losses import cosines, coupling, kl_to_base

logger = logging.getLogger("llamafactory_hera")

_STATE, _RUN = "state.safetensors", "run.json"


class Prepared(NamedTuple):
    """A micro-batch before the forward pass of the adapted model."""

    harmful: Tensor  #: boolean ``[B]``
    benign_tokens: Tensor  #: The tokens of benign responses, boolean ``[B, T]``.
    base_logits: Tensor  #: The base model's logits at these tokens, ``[N, V]``.


class Coupler:
    """The state and the steps of the method during one run, independent of any trainer.

    Args:
        model: A PEFT model, before an engine wraps it. Its base is the model without the adapter.
        config: The ``harc_*`` keys.
        extract: The rows by class that define the directions.
        collate: The collator of the training batches.
        output_dir: The folder of the run, for the directions of the base model.

    Raises:
        ValueError: A layer is outside the model, or a file has directions of another model.
    """

    def __init__(
        self,
        model: Any,
        config: HarcConfig,
        extract: Mapping[str, Sequence[Row]],
        collate: HarcCollator,
        output_dir: str | os.PathLike,
    ) -> None:
        self.config, self._model, self._folder = config, model, Path(output_dir) / geometry.FOLDER
        self._extract, self._collate = extract, collate
        layout = head_layout(model_config(model))
        self._n_layers = layout.n_layers
        #: The layers that are coupled now.
        self.layers: tuple[int, ...] = config.named_layers or ()
        if self.layers and self.layers[-1] > layout.n_layers:
            raise ValueError(f"harc_layers: {self.layers[-1]} does not exist: the model has {layout.n_layers} blocks.")
        #: The base model's directions ``[4, n, D]``, and those of the last refresh; None before the first step.
        self.base: Tensor | None = None
        if config.directions != AUTO:
            self.base = geometry.load(config.directions)
            if self.base.shape != (4, layout.n_layers, layout.hidden_size):
                raise ValueError(f"harc_directions: {config.directions} has those of another model; extract again.")
        self.directions = self.base
        #: True if no row of the latest micro-batch has a label, so that a mean over labels is not a number.
        self.unlabeled = False
        self._capture: LayerCapture | None = None
        self._logits = _LogitsCapture(model)
        self._statistics = RunningMeans()
        self._n_steps, self._up_to_date = 0, -1  # optimizer steps, and the step for which layers were chosen

    # -- one micro-batch -------------------------------------------------------------------------------------------

    def prepare(self, batch: dict[str, Any]) -> Prepared | None:
        """Takes HARC's tensors out of a batch, runs the base model, and sets the tokens to read.

        Returns None for a batch from a different collator. Every process must call it.
        """
        inputs = {name: batch.pop(name) for name in list(batch) if name.startswith(PREFIX)}
        if not inputs:
            return None
        harmful, response = inputs["harc_harmful"], inputs["harc_response"]
        self.after_backward()  # of a micro-batch that failed
        self._update(harmful.device)
        self.unlabeled = not bool(harmful.any())
        tokens = response & ~harmful.unsqueeze(1)
        base_logits = self._base_logits(batch, tokens)
        assert self._capture is not None
        self._capture.pool(reading_mask(inputs["harc_positions"], response, self.config.window))
        return Prepared(harmful, tokens, base_logits)

    def _base_logits(self, batch: Mapping[str, Any], tokens: Tensor) -> Tensor:
        rows = tokens.any(dim=1)
        if not bool(rows.any()):
            rows[0] = True  # under ZeRO-3, a pass needs every process
        with torch.no_grad(), evaluating(self._model, _device(self._model)), self._model.disable_adapter():
            inputs = {name: batch[name][rows] for name in ("input_ids", "attention_mask")}
            return self._model(**inputs, use_cache=False).logits[tokens[rows]]

    def loss(self, prepared: Prepared) -> Tensor:
        """Computes the weighted term of the latest forward pass; every process must call it."""
        config, harmful = self.config, prepared.harmful
        assert self._capture is not None
        assert self.directions is not None
        rows = self._capture.representations().unflatten(1, (len(harmful), 3)).unbind(2)
        chosen = self.directions[:, [layer - 1 for layer in self.layers]]
        harm = cosines(rows[geometry.INSTRUCTION], chosen[geometry.HARM])
        refusal = cosines(rows[geometry.PROMPT], chosen[geometry.REFUSAL])
        later_harm = cosines(rows[geometry.RESPONSE], chosen[geometry.RESPONSE_HARM])
        later_refusal = cosines(rows[geometry.RESPONSE], chosen[geometry.RESPONSE_REFUSAL])
        losses = {
            "harc_coupling": coupling(refusal, harm, harmful, config.margin),
            "harc_response": coupling(later_refusal, later_harm, harmful, config.margin),
            "harc_kl": kl_to_base(self._logits.take()[prepared.benign_tokens], prepared.base_logits),
        }
        self._statistics.add(**{name: loss.detach() for name, loss in losses.items()})
        for name, pair in (("prompt", refusal + harm), ("response", later_refusal + later_harm)):
            for kind, mask in (("harmful", harmful), ("benign", ~harmful)):  # NaN if the class is missing
                self._statistics.add(**{f"harc_cos_{kind}_{name}": pair.detach()[:, mask].mean() / 2})
        weights = (config.coupling_weight, config.response_weight, config.kl_weight)
        return torch.stack([weight * loss for weight, loss in zip(weights, losses.values(), strict=True)]).sum()

    def after_backward(self) -> None:
        """Stops reading tokens. The hinges may have sent no gradient, once all cosines are beyond the margin."""
        if self._capture is not None:
            self._capture.pool(None)
        self._logits.kept = None

    def optimizer_step(self, *_: Any) -> None:
        """Counts an optimizer step; HARC trains no parameters of its own."""
        self._n_steps += 1

    # -- directions and layers -------------------------------------------------------------------------------------

    def _update(self, device: torch.device) -> None:
        """Extracts the directions and chooses layers where that is due, at the same step on every process."""
        config, step, start = self.config, self._n_steps, time.monotonic()
        if step == self._up_to_date and self._capture is not None:
            return
        self._up_to_date, layers, before = step, self.layers, self.directions
        if self.base is None or self.directions is None:
            self.base = self.directions = self.extract(device, adapted=False)
        elif config.refresh and step and step % config.refresh == 0:
            fresh = self.extract(device)
            self.directions = geometry.blend(self.base.to(device), fresh, config.refresh_share)
        else:
            self.directions = self.directions.to(device)
        if config.named_layers is None:
            self.layers = geometry.best_layers(self.directions, config.count_at(step))
        if self._capture is None or self.layers != layers:
            self._hook()
        if rank() == 0 and self.directions is not before:
            numbers, seconds = ", ".join(map(str, self.layers)), time.monotonic() - start
            logger.info(f"HARC | step {step}: layers {numbers}; directions extracted in {seconds:.1f} s")
            if before is None:
                self.save_directions()

    def _hook(self) -> None:
        self.release()
        # layer l is the input of block l, and LayerCapture reads outputs
        self._capture = LayerCapture(self._model, [f"L{layer - 1}" for layer in self.layers])
        self._capture.install()
        self._logits.install()

    def extract(self, device: torch.device, adapted: bool = True) -> Tensor:
        """Extracts the directions ``[4, n, D]`` of the model, or of its base; every process runs a part of the rows."""
        without = nullcontext() if adapted else getattr(self._model, "disable_adapter", nullcontext)()
        capture = LayerCapture(self._model, [f"L{index}" for index in range(self._n_layers)])
        with torch.no_grad(), evaluating(self._model, _device(self._model)), without, capture:
            means = {kind: self._mean(rows, capture, device) for kind, rows in self._extract.items()}
        return geometry.from_means(means["harmful"], means["harmless"], means["compliant"])

    def _mean(self, rows: Sequence[Row], capture: LayerCapture, device: torch.device) -> Tensor:
        """Averages the rows of a class at the three positions, ``[3, n, D]``."""
        size, total = self.config.extract_batch_size, torch.zeros((), device=device)
        # each process makes the same number of passes, as ZeRO-3 needs; surplus passes count 0
        for start in range(0, len(rows), size * world_size()):
            part = rows[start + rank() * size : start + (rank() + 1) * size]
            batch = {name: value.to(device) for name, value in self._collate(list(part or rows[:1])).items()}
            capture.pool(reading_mask(batch["harc_positions"], batch["harc_response"], self.config.window))
            self._model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
            total = total + capture.representations().float().unflatten(1, (-1, 3)).sum(dim=1) * bool(part)
        if world_size() > 1:
            torch.distributed.all_reduce(total)
        return total.transpose(0, 1) / len(rows)

    def save_directions(self) -> None:
        """Writes the base model's directions, and what is known about them, into the folder ``harc`` of the run."""
        assert self.base is not None
        name = getattr(model_config(self._model), "_name_or_path", "")
        provenance = {"model": name, "rows": {kind: len(rows) for kind, rows in self._extract.items()}}
        layers = self.layers or geometry.best_layers(self.base, self.config.n_layers)
        geometry.save(self._folder, self.base.cpu(), layers, {**provenance, "keys": self.config.keys()})

    # -- the run ---------------------------------------------------------------------------------------------------

    def logs(self) -> dict[str, float]:
        """Returns the losses and cosines since the last call."""
        return self._statistics.take()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the directions, the layers and the step into ``folder/harc``; nothing before the first step."""
        if self.base is not None and self.directions is not None:
            steps, layers = torch.tensor([self._n_steps, self._up_to_date]), torch.tensor(self.layers)
            state = {"base": self.base, "directions": self.directions.clone(), "layers": layers, "steps": steps}
            write_safetensors(Path(folder) / geometry.FOLDER / _STATE, state)
            write_json(Path(folder) / geometry.FOLDER / _RUN, self.config.keys())

    def check(self, folder: str | os.PathLike) -> None:
        """Raises ``ValueError`` if a checkpoint does not belong to this run; loads nothing."""
        if changed := changes(
            read_json(Path(folder) / geometry.FOLDER / _RUN), self.config.keys(), HarcConfig.knobs()
        ):
            raise ValueError(
                f"resume_from_checkpoint: this run differs from the one that wrote {folder}: {'; '.join(changed)}. "
                "Restore these keys, or start a new run."
            )

    def load(self, folder: str | os.PathLike) -> None:
        """Restores the state that :meth:`save` wrote."""
        path = Path(folder) / geometry.FOLDER / _STATE
        with reading(path, "the state of a checkpoint"):
            state = load_file(path)
            self.base, self.directions = state["base"], state["directions"]
            self.layers = tuple(state["layers"].tolist())
            self._n_steps, self._up_to_date = state["steps"].tolist()

    def close(self) -> None:
        """Ends the run."""
        self.release()

    def release(self) -> None:
        """Removes the hooks from the model."""
        self._logits.remove()
        if self._capture is not None:
            self._capture.remove()
            self._capture = None


class _LogitsCapture(Hooks):
    """Keeps the logits of a forward pass with a graph, because not every trainer passes its outputs on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._causal = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        self.kept: Tensor | None = None

    def _hook(self) -> None:
        # no forward hook, because PEFT calls `forward` itself
        self._replace(self._causal, "forward", partial(self._run, self._causal.forward))

    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if torch.is_grad_enabled():
            self.kept = getattr(output, "logits", None)
        return output

    def take(self) -> Tensor:
        """Returns the kept logits; raises ``ValueError`` if a fused loss computed none."""
        logits, self.kept = self.kept, None
        if not isinstance(logits, Tensor):
            raise ValueError(
                "loss: the model returned no logits, which the KL term compares; turn fused and chunked losses off "
                "(enable_liger_kernel, use_liger_kernel, loss_type)."
            )
        return logits


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
