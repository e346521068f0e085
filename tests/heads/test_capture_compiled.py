"""torch.compile traces the model with its captures as one graph, and changes no representation and no gradient.

The backend ``eager`` runs the graphs that torch.compile has traced without generating code for them.
"""

from collections.abc import Iterator

import pytest
import torch
from tests.head_reference import CAPTURES, checkpoint, checkpointed, gradients, weighted_sum
from tests.tiny_models import text_batch, text_model
from torch import Tensor, nn
from torch._dynamo.utils import counters

from llamafactory_hera.heads.capture import HeadCapture, LayerCapture

WITH_FINAL = CAPTURES | {"final": LayerCapture}


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(checkpointing: bool | None) -> nn.Module:
    model = text_model("qwen3", attention_bias=True, use_cache=False)
    checkpoint(model, checkpointing)
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
    (loss + weighted_sum(z)).backward()
    return {"z": z.detach(), **gradients(model)}


@pytest.mark.parametrize("names", WITH_FINAL, ids=["heads", "layers", "final"])
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
    with WITH_FINAL[names](plain, names) as expected, WITH_FINAL[names](model, names) as capture:
        for seed in range(3):
            want, got = step(plain, plain, expected, seed), step(model, compiled, capture, seed)
            for name, values in want.items():
                scale = max(1.0, values.abs().max().item())
                torch.testing.assert_close(got[name], values, rtol=0, atol=1e-6 * scale)
    assert sum(counters["graph_break"].values()) == 0
    assert len(graphs) == 2  # a new mask does not cause a recompilation
