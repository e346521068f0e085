"""torch.compile traces the model with its captures as one graph, and changes no representation and no gradient.

The backend ``eager`` runs the graphs that torch.compile has traced without generating code for them.
"""

from collections.abc import Iterator

import pytest
import torch
from tests.tiny_models import text_batch, text_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

from llamafactory_hera.heads.capture import HeadCapture, LayerCapture

CAPTURES = {"L1H3,L0H2,L1H0,L1H1": HeadCapture, "L1,L0": LayerCapture, "final": LayerCapture}
each = pytest.mark.parametrize("names", CAPTURES, ids=["heads", "layers", "final"])
checkpointed = pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "non-reentrant"])


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(checkpointing: bool | None) -> nn.Module:
    model = text_model("qwen3", attention_bias=True, use_cache=False)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return model


def step(model: nn.Module, call: nn.Module, capture: HeadCapture | LayerCapture, seed: int) -> dict[str, Tensor]:
    """Returns the representations and the gradients of one training step."""
    batch = text_batch(seed=seed)
    mask = batch["attention_mask"].bool()
    mask[:, :2] = False
    model.zero_grad()
    capture.pool(mask)
    loss = call(**batch, labels=batch["input_ids"]).loss
    z = capture.representations()
    (loss + (z * torch.linspace(-1, 1, z.numel()).view_as(z)).sum()).backward()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return {"z": z.detach(), **found}


@each
@checkpointed
def test_representations_and_gradients_without_a_graph_break(checkpointing, names):
    plain, model = build(checkpointing), build(checkpointing)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    compiled(**text_batch(), labels=text_batch()["input_ids"])  # compiled before it is hooked
    assert len(graphs) == 1
    with CAPTURES[names](plain, names) as expected, CAPTURES[names](model, names) as capture:
        for seed in range(3):
            want, got = step(plain, plain, expected, seed), step(model, compiled, capture, seed)
            for name, values in want.items():
                scale = max(1.0, values.abs().max().item())
                torch.testing.assert_close(got[name], values, rtol=0, atol=1e-6 * scale)
    assert sum(counters["graph_break"].values()) == 0
    assert len(graphs) == 2  # a new mask does not cause a recompilation
