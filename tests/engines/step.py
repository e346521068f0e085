"""One training step of ``L_LM + weight * L_HeRA``, the same code on one process and on several."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from llamafactory_hera.alignment.memory import CrossBatchMemory
from llamafactory_hera.heads import HeadCapture, LayerCapture
from llamafactory_hera.integrations.llamafactory.visual_tokens import token_positions
from llamafactory_hera.objectives import Options, create
from llamafactory_hera.training.gradcache import GradientCache
from llamafactory_hera.training.own_parameters import OwnParameters
from llamafactory_hera.training.patch_term import PatchTerm
from llamafactory_hera.training.random_state import RandomState
from llamafactory_hera.training.term import HeraTerm

from .tiny import HEADS, HIDDEN, IMAGE_TOKEN, N_PATCHES, TEACHER_DIM, Batch, K

#: Weights of the LM loss and of the HeRA term. The LM loss is multiplied by 0, not left out: DDP wants every parameter
#: in the graph.
LOSSES = {"both": (1.0, 0.1), "hera": (0.0, 1.0)}


def patches(teacher: Tensor) -> Tensor:
    """Different features for the 3 x 3 patches of each image, ``[B, 3, 3, D_teacher]``, made of its one vector."""
    return torch.stack([teacher.roll(shift, dims=1) for shift in range(9)], dim=1).unflatten(1, (3, 3))


class Step:
    """Capture and term of one model.

    Args:
        model: The model before an engine wraps it.
        memory: Remembered pairs.
        objective: Its name.
        sites: Heads or layers.
    """

    def __init__(
        self,
        model: nn.Module,
        memory: CrossBatchMemory | None = None,
        objective: str = "contrastive",
        sites: str = HEADS,
    ) -> None:
        self.capture = HeadCapture(model, sites) if "H" in sites else LayerCapture(model, sites)
        options = Options(n_sites=len(sites.split(",")), dim=HIDDEN, teacher_dim=TEACHER_DIM)
        self.objective = create(objective, options)
        self.own = OwnParameters(self.objective)
        self._patches = self.objective.view == "patches"
        self.term = PatchTerm(self.objective) if self._patches else HeraTerm(self.objective, K, memory=memory)

    def forward(self, forward: Callable[..., object], batch: Batch) -> tuple[Tensor, Tensor]:
        """The LM loss and the representations."""
        self.capture.install()
        if self._patches:
            ids, attended = batch.inputs["input_ids"], batch.inputs["attention_mask"]
            image = torch.stack([torch.zeros_like(batch.valid), batch.valid], dim=1).long()
            self.capture.tokens(token_positions(ids, attended, image, IMAGE_TOKEN, N_PATCHES))
        else:
            self.capture.pool(batch.inputs["labels"] != -100)
        lm_loss = forward(**batch.inputs).loss
        return lm_loss, self.capture.representations()

    def loss(self, forward: Callable[..., object], batch: Batch, weights: tuple[float, float]) -> Tensor:
        """The weighted sum, with the forward pass through ``forward``."""
        lm_loss, representations = self.forward(forward, batch)
        teacher = patches(batch.teacher) if self._patches else batch.teacher
        output = self.term(representations, teacher, batch.valid)
        assert output.finite
        return weights[0] * lm_loss + weights[1] * output.loss

    def cached_losses(
        self,
        forward: Callable[..., object],
        micro_batches: list[Batch],
        weights: tuple[float, float],
        repeat: bool = True,
    ) -> Iterator[Tensor]:
        """The weighted sum under gradient caching, one micro-batch after the other; their sum is the loss.

        Without ``repeat`` the second pass draws other random numbers than the first.
        """
        cache = GradientCache()
        states = []
        for batch in micro_batches:
            states.append(RandomState(torch.device("cpu")))
            with torch.no_grad():
                cache.add(self.forward(forward, batch)[1], batch.teacher, batch.valid)
            self.capture.pool(None)
        cache.solve(self.term, weights[1])
        for batch, state in zip(micro_batches, states, strict=True):
            if repeat:
                state.restore()
            lm_loss, representations = self.forward(forward, batch)
            yield (weights[0] * lm_loss + cache.take(representations)) / len(micro_batches)

    def take_own_gradients(self) -> dict[str, Tensor]:
        """The gradients of what the objective trains, then forgotten; 0 where there is none."""
        self.own.reduce_gradients()
        found = {}
        for name, parameter in self.objective.named_parameters():
            found[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
        return found
