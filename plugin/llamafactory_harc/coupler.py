"""The coupling in one run: extracts and refreshes the directions, chooses layers, and computes the weighted term."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llamafactory_hera.distributed import rank, sum_over_ranks, world_size
from llamafactory_hera.files import read_json, reading, write_json, write_safetensors
from llamafactory_hera.heads.capture import LayerCapture
from llamafactory_hera.heads.families import head_layout, model_config
from llamafactory_hera.heads.hooks import Hooks
from llamafactory_hera.keys import changes
from llamafactory_hera.selection.rows import evaluating
from llamafactory_hera.training.watch import RunningMeans

from . import directions as geometry
from .config import AUTO, HarcConfig
from .data import PREFIX, HarcCollator, Row, Rows, reading_mask
from .losses import cosines, coupling, kl_to_base

logger = logging.getLogger("llamafactory_hera")

_STATE, _RUN = "state.safetensors", "run.json"
_BATCH = 8  # rows in a forward pass of the extraction

#: Masks of harmful rows ``[B]`` and benign response tokens ``[B, T]``, and the base model's logits there ``[N, V]``.
Prepared = tuple[Tensor, Tensor, Tensor]


class Coupler:
    """The state and the steps of the method during one run; implements ``Method`` of ``integrations.method_trainer``.

    ``model`` is a PEFT model that no engine has wrapped yet; with its adapter disabled, it is the base model.
    ``extract`` contains the rows that define the directions, by class.
    """

    def __init__(
        self, model: Any, config: HarcConfig, extract: Rows, collate: HarcCollator, output_dir: str | os.PathLike
    ) -> None:
        self.config, self._model, self._folder = config, model, Path(output_dir) / geometry.FOLDER
        self._extract, self._collate = extract, collate
        layout = head_layout(model_config(model))
        self._n_layers = layout.n_layers
        #: The layers that are coupled now; empty before the first step if the scores choose them.
        self.layers = config.named_layers
        if max(self.layers, default=0) > layout.n_layers:
            raise ValueError(
                f"harc_layers: L{self.layers[-1]} does not exist; the model ends with L{layout.n_layers}."
            )
        #: The base model's directions ``[4, n, D]``; None before they are extracted.
        self.base = None if config.directions == AUTO else geometry.load(config.directions)
        if self.base is not None and self.base.shape[1:] != (layout.n_layers, layout.hidden_size):
            raise ValueError(f"harc_directions: {config.directions} belongs to another model; extract this model's.")
        #: The directions of the last refresh.
        self.directions: Any = self.base
        #: True if no row of the latest micro-batch has a label, so that a mean over labels is NaN.
        self.unlabeled = False
        self._capture: Any = None
        self._logits = _LogitsCapture(model)
        self._statistics = RunningMeans()
        self._n_steps, self._up_to_date = 0, -1  # optimizer steps, and the step for which layers were chosen

    def prepare(self, batch: dict[str, Any]) -> Prepared | None:
        """Removes HARC's tensors, if any, from a batch, runs the base model, and sets the tokens to read."""
        inputs = {name: batch.pop(name) for name in list(batch) if name.startswith(PREFIX)}
        if not inputs:
            return None
        self.after_backward()  # discards the remains of a failed micro-batch
        harmful = inputs["harc_harmful"]
        capture = self._updated(harmful.device)
        self.unlabeled = not bool(harmful.any())
        tokens = inputs["harc_response"] & ~harmful.unsqueeze(1)
        rows = tokens.any(dim=1)
        rows[0] |= ~rows.any()  # ZeRO-3 needs every process in each pass, so at least one row always runs
        with self._model.disable_adapter():
            logits = self._forward(batch["input_ids"][rows], batch["attention_mask"][rows])
        capture.pool(reading_mask(inputs, self.config.window))
        return harmful, tokens, logits[tokens[rows]]

    def _forward(self, ids: Tensor, mask: Tensor, keep: int = 0) -> Tensor:
        with torch.no_grad(), evaluating(self._model, next(self._model.parameters()).device):
            return self._model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep).logits

    def loss(self, prepared: Prepared) -> Tensor:
        """Computes the weighted term of the latest forward pass; every process must call it."""
        config, logits, (harmful, tokens, base_logits) = self.config, self._logits.kept, prepared
        if logits is None:
            raise ValueError("loss: the model returned no logits for HARC to compare; turn fused losses off.")
        instruction, prompt, response = self._capture.representations().unflatten(1, (len(harmful), 3)).unbind(2)
        pairs = zip((instruction, prompt, response, response), self.directions, strict=True)
        chosen = [layer - 1 for layer in self.layers]
        harm, refusal, later_harm, later_refusal = (cosines(rows, directions[chosen]) for rows, directions in pairs)
        at_prompt = coupling(refusal, harm, harmful, config.margin)
        over_response = coupling(later_refusal, later_harm, harmful, config.margin)
        kl = kl_to_base(logits[tokens], base_logits)
        self._statistics.add(harc_coupling=at_prompt.detach(), harc_response=over_response.detach())
        self._statistics.add(harc_kl=kl.detach())
        for name, pair in (("prompt", refusal + harm), ("response", later_refusal + later_harm)):
            for kind, mask in (("harmful", harmful), ("benign", ~harmful)):  # NaN if the class is missing
                self._statistics.add(**{f"harc_cos_{kind}_{name}": pair.detach()[:, mask].mean() / 2})
        return config.coupling_weight * at_prompt + config.response_weight * over_response + config.kl_weight * kl

    def after_backward(self) -> None:
        """Stops reading activations. Expects no gradient, because all cosines may be beyond the margin."""
        if self._capture is not None:
            self._capture.pool(None)
        self._logits.kept = None

    def optimizer_step(self, *_: Any) -> None:
        """Counts an optimizer step; HARC trains no parameters of its own."""
        self._n_steps += 1

    def _updated(self, device: torch.device) -> LayerCapture:
        """Extracts the directions and chooses the layers when due, at the same step on every process."""
        config, step, start = self.config, self._n_steps, time.monotonic()
        if step == self._up_to_date and self._capture is not None:
            return self._capture
        self._up_to_date, before, layers = step, self.directions, self.layers
        if self.base is None or before is None:
            with self._model.disable_adapter():
                self.base = self.directions = self.extract(device)
        elif config.refresh and step and step % config.refresh == 0:
            self.directions = geometry.blend(self.base.to(device), self.extract(device), config.refresh_share)
        elif before.device != device:
            self.directions = before.to(device)
        if not config.named_layers:
            count = config.late_layers if step >= config.late_from else config.n_layers
            self.layers = geometry.best_layers(self.directions, count)
        if rank() == 0 and self.directions is not before:
            logger.info(f"HARC | step {step}: layers {self.layers}; directions took {time.monotonic() - start:.1f} s")
            if before is None:
                self.save_directions()
        if self._capture is None or self.layers != layers:
            self.release()
            # layer l is the input of block l, but LayerCapture reads outputs
            self._capture = LayerCapture(self._model, [f"L{layer - 1}" for layer in self.layers])
            self._capture.install()
            self._logits.install()
        return self._capture

    def extract(self, device: torch.device) -> Tensor:
        """Extracts the directions ``[4, n, D]`` of the model as it is now; each process runs a part of the rows."""
        with LayerCapture(self._model, [f"L{index}" for index in range(self._n_layers)]) as capture:
            return geometry.from_means(*(self._mean(rows, capture, device) for rows in self._extract.values()))

    def _mean(self, rows: Sequence[Row], capture: LayerCapture, device: torch.device) -> Tensor:
        """Averages the activations of a class at the three positions, ``[3, n, D]``."""
        total = torch.zeros((), device=device)
        # ZeRO-3 needs the same number of passes on each process; surplus passes add 0
        for start in range(0, len(rows), _BATCH * world_size()):
            part = rows[start + rank() * _BATCH :][:_BATCH]
            batch = {name: value.to(device) for name, value in self._collate([*(part or rows[:1])]).items()}
            capture.pool(reading_mask(batch, self.config.window))
            self._forward(batch["input_ids"], batch["attention_mask"], keep=1)
            total = total + capture.representations().float().unflatten(1, (-1, 3)).sum(dim=1) * bool(part)
        return sum_over_ranks(total)[0].transpose(0, 1) / len(rows)

    def save_directions(self) -> None:
        """Writes the base model's directions and their provenance into the run's ``harc`` folder."""
        assert self.base is not None
        counts, keys = {kind: len(rows) for kind, rows in self._extract.items()}, self.config.keys()
        origin = {"model": getattr(model_config(self._model), "_name_or_path", ""), "rows": counts, "keys": keys}
        layers = self.layers or geometry.best_layers(self.base, self.config.n_layers)
        geometry.save(self._folder, self.base, layers, origin)

    def logs(self) -> dict[str, float]:
        """Returns the losses and cosines since the last call."""
        return self._statistics.take()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the keys, the directions and the step into ``folder/harc``, but only after the first step."""
        if self.base is not None and self.directions is not None:
            state = {"base": self.base, "directions": self.directions.clone(), "steps": torch.tensor(self._n_steps)}
            write_safetensors(Path(folder) / geometry.FOLDER / _STATE, state)
            write_json(Path(folder) / geometry.FOLDER / _RUN, self.config.keys())

    def check(self, folder: str | os.PathLike) -> None:
        """Raises ``ValueError`` if a checkpoint does not belong to this run; loads nothing."""
        saved, keys = read_json(Path(folder) / geometry.FOLDER / _RUN), self.config.keys()
        if changed := changes(saved, keys, keys):
            raise ValueError(f"resume_from_checkpoint: in {folder}, {'; '.join(changed)}. Restore these keys.")

    def load(self, folder: str | os.PathLike) -> None:
        """Restores the state that ``save`` wrote; the layers follow from the directions."""
        path = Path(folder) / geometry.FOLDER / _STATE
        with reading(path, "the state of a checkpoint"):
            state = load_file(path)
            self.base, self.directions, self._n_steps = state["base"], state["directions"], int(state["steps"])

    def release(self) -> None:
        """Removes the hooks from the model."""
        self._logits.remove()
        if self._capture is not None:
            self._capture.remove()
            self._capture = None

    close = release


class _LogitsCapture(Hooks):
    """Keeps the logits of the latest pass with gradients, because some trainers do not return the model's outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._causal = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
        self.kept: Tensor | None = None

    def _hook(self) -> None:
        # not with a forward hook, because PEFT calls `forward` directly
        self._replace(self._causal, "forward", partial(self._run, self._causal.forward))

    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if torch.is_grad_enabled():
            self.kept = getattr(output, "logits", None)  # None with a fused loss
        return output
