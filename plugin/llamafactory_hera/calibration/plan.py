"""The updates of a calibration and their step sizes (sections 3.2.2 to 3.4.2 of the paper)."""

import random
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

from ..heads.targets import Target
from ..selection.passes import Forward, plan_batches, run_batches
from ..selection.samples import Collate, Features
from .profile import Profile, check_finite, counted_logits
from .settings import RahConfig
from .weights import Edit, HeadWeights, Scaled, Slice, Update, applied


class Anchor(NamedTuple):
    """An anchor of a chosen head; ``similarity`` is the weighted mean of the other two values (eq. 9)."""

    head: Target
    similarity: float
    functional: float
    parametric: float


class Plan(NamedTuple):
    """The updates that the trust region will try, with their heads and anchors."""

    heads: list[Target]  #: The chosen heads, highest CAF first.
    anchors: dict[Target, list[Anchor]]  #: The anchors of each chosen head, most similar first.
    updates: list[Update]  #: In the order of their first occurrence in ``heads``.


def make_plan(profile: Profile, weights: HeadWeights, config: RahConfig) -> Plan:
    """Chooses heads and anchors, and computes the updates."""
    heads = choose_heads(profile.saliency, profile.influence(config.caf_lambda), config)
    if config.update == "prune":
        return Plan(heads, {head: [] for head in heads}, [removal(head, weights) for head in heads])
    anchors = {head: find_anchors(head, profile, weights, config) for head in heads}
    groups = {head: weights.group(head) for head in heads if anchors[head]}
    # Heads that share a value block form one unit if all of them change. Any other head is a unit by itself.
    units = [group if groups.keys() >= set(group) else (head,) for head, group in groups.items()]
    return Plan(heads, anchors, [make_update(unit, anchors, weights, config) for unit in dict.fromkeys(units)])


def choose_heads(saliency: Tensor, influence: Tensor, config: RahConfig) -> list[Target]:
    """Chooses the heads to calibrate from I-SAL and CAF ``[L, H]`` (eq. 6 and 7), highest CAF first.

    ``paper`` chooses heads with I-SAL below a percentile of their layer and CAF above a percentile of their layer.
    ``no_caf`` omits the second condition, and ``inverse`` mirrors the first. ``random`` samples as many heads from
    each layer as ``paper`` would choose.
    """
    scores = -saliency if config.targets == "inverse" else saliency
    chosen = scores < torch.quantile(scores, config.p_isal / 100, dim=1, keepdim=True)
    if config.targets != "no_caf":
        chosen &= influence > torch.quantile(influence, config.p_caf / 100, dim=1, keepdim=True)
    generator = random.Random(config.seed)
    n_layers, n_heads = saliency.shape
    targets: list[Target] = []
    for layer in config.layer_indices(n_layers):
        heads = chosen[layer].nonzero().flatten().tolist()
        if config.targets == "random":
            heads = generator.sample(range(n_heads), len(heads))
        targets += [Target(layer, head) for head in heads]
    return sorted(targets, key=lambda head: (-influence[head].item(), head))


def candidates(saliency: Tensor, head: Target, beta: float) -> list[Target]:
    """Lists other heads with I-SAL above ``beta`` (eq. 8), in the same layer, else one layer away, else two."""
    above = [Target(*place) for place in (saliency > beta).nonzero().tolist()]
    for distance in (0, 1, 2):
        if pool := [other for other in above if abs(other.layer - head.layer) == distance and other != head]:
            return pool
    return []


def find_anchors(head: Target, profile: Profile, weights: HeadWeights, config: RahConfig) -> list[Anchor]:
    """Finds the ``k`` candidates that are most similar to a head, most similar first.

    The similarity is ``rho * s_func + (1 - rho) * s_param`` (eq. 9). ``s_func`` is the cosine of the text-to-image
    maps (eq. 10), and ``s_param`` is the weighted sum of the cosines of the value and output slices (eq. 11).
    """

    def cosine(a: Tensor, b: Tensor) -> float:
        return cosine_similarity(a.flatten(), b.flatten(), dim=0).item()

    anchors = []
    for other in candidates(profile.saliency, head, config.beta):
        functional = cosine(profile.maps[head].double(), profile.maps[other].double())
        value = cosine(weights.of_head(head, "value").float(), weights.of_head(other, "value").float())
        output = cosine(weights.of_head(head, "output").float(), weights.of_head(other, "output").float())
        parametric = config.w_v * value + config.w_o * output
        similarity = config.rho * functional + (1 - config.rho) * parametric
        anchors.append(Anchor(other, similarity, functional, parametric))
    return sorted(anchors, key=lambda anchor: (-anchor.similarity, anchor.head))[: config.k]


def make_update(
    heads: tuple[Target, ...], anchors: dict[Target, list[Anchor]], weights: HeadWeights, config: RahConfig
) -> Update:
    """Computes the joint update of the heads of a unit.

    The output slice of each head moves toward the trimmed mean of its anchors' slices (eq. 12). A value block moves
    only if all of its heads belong to the unit. It moves toward the mean of their trimmed means; the paper does not
    describe this case.
    """

    def edit(sharing: Sequence[Target], kind: Slice) -> Edit:
        means = []
        for head in sharing:
            stack = torch.stack([weights.of_head(anchor.head, kind) for anchor in anchors[head]])
            means.append(trimmed_mean(stack, config.trim))
        difference = torch.stack(means).mean(dim=0) - weights.of_head(sharing[0], kind).float()
        return Edit(sharing[0], kind, *low_rank(difference, config.rank))

    edits = [edit([head], "output") for head in heads]
    if len(heads) == weights.group_size:
        edits.append(edit(heads, "value"))
    return Update(heads, tuple(edit for edit in edits if edit.left.shape[1] > 0))


def removal(head: Target, weights: HeadWeights) -> Update:
    """Returns the update that sets the output slice of a head to zero (head pruning, section 3.6)."""
    output = weights.of_head(head, "output").float()  # W + (-W @ I) is exact in any floating-point type
    return Update((head,), (Edit(head, "output", -output, torch.eye(output.shape[1], device=output.device)),))


def trimmed_mean(stack: Tensor, trim: float) -> Tensor:
    """Averages ``[k, ...]`` element by element without the ``floor(trim * k)`` lowest and highest values."""
    cut = int(trim * len(stack))
    return stack.float().sort(dim=0).values[cut : len(stack) - cut].mean(dim=0)


def low_rank(difference: Tensor, rank: int | Literal["full"]) -> tuple[Tensor, Tensor]:
    """Factors the nearest matrix of the given rank (eq. 13) into ``[m, r]`` and ``[r, n]``, in fp32.

    ``r`` is below the rank, down to 0, if fewer singular values than that exceed rounding noise.
    """
    u, sigma, v = torch.linalg.svd(difference.float(), full_matrices=False)
    noise = torch.finfo(sigma.dtype).eps * max(difference.shape) * sigma[:1]
    nonzero = int((sigma > noise).sum())
    r = nonzero if rank == "full" else min(rank, nonzero)
    root = sigma[:r].sqrt()
    return u[:, :r] * root, root[:, None] * v[:r]


# -- the trust region ------------------------------------------------------------------------------------------------

#: Returns the KL divergence in nats between the unchanged model and the model with the given updates.
Divergence = Callable[[Sequence[Scaled]], float]


class Trial(NamedTuple):
    """The result for one update."""

    update: Update
    state: str
    alpha: float = 0.0  #: The step size; 0 if the update was rolled back.
    tried: Sequence[tuple[float, float]] = ()  #: Step sizes tried with this update alone, each with its KL in nats.


class Outcome(NamedTuple):
    """The results for all updates, in the order of the plan."""

    trials: Sequence[Trial] = ()
    kl_before: float = 0.0  #: The KL divergence of all updates together, before any rollback.
    kl: float = 0.0  #: The KL divergence of the updates that remain.

    @property
    def accepted(self) -> list[Scaled]:
        """The updates that remain, with their step sizes."""
        return [(trial.update, trial.alpha) for trial in self.trials if trial.alpha > 0]


def try_updates(updates: Sequence[Update], kl: Divergence, config: RahConfig) -> Outcome:
    """Finds a step size for each update, then rolls back the last updates until the rest stay within the bound.

    The step size is the first of ``alpha_max``, ``alpha_max / 2``, … at which the divergence ``kl`` is at most
    ``delta`` (text below eq. 15). The updates are ordered by CAF, highest first, so the least influential ones are
    rolled back. Pruning has no bound, and all of its updates remain.
    """
    if config.update == "prune":
        trials = [Trial(update, "pruned", 1.0) for update in updates]
        return Outcome(trials, *[kl(Outcome(trials).accepted)] * 2)
    trials = [_try(update, kl, config) for update in tqdm(updates, desc="RAH-LoRA | trust region", unit="update")]
    accepted = [index for index, trial in enumerate(trials) if trial.alpha > 0]
    totals = [kl(Outcome(trials).accepted) if accepted else 0.0]
    while not totals[-1] <= config.delta:  # unlike `>`, this also holds if the changed model computes NaN
        last = accepted.pop()
        trials[last] = trials[last]._replace(state="rolled back: total too large", alpha=0.0)
        totals.append(kl(Outcome(trials).accepted) if accepted else 0.0)
    return Outcome(trials, totals[0], totals[-1])


def _try(update: Update, kl: Divergence, config: RahConfig) -> Trial:
    if not update.edits:
        return Trial(update, "equals its anchors")
    tried: list[tuple[float, float]] = []
    for halving in range(config.halvings + 1):
        alpha = config.alpha_max / 2**halving
        tried.append((alpha, kl([(update, alpha)])))
        if tried[-1][1] <= config.delta:
            return Trial(update, "calibrated", alpha, tried)
    return Trial(update, "rolled back: no step is small enough", 0.0, tried)


def held_out_divergence(
    forward: Forward, weights: HeadWeights, features: Sequence[Features], collate: Collate, config: RahConfig
) -> Divergence:
    """Runs the unchanged model on held-out samples (B in eq. 15), and returns a function for divergence from it.

    The logits of the unchanged model stay on the CPU. A divergence is averaged over tokens, then over samples.
    """

    @torch.no_grad()
    def run(batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
        logits, _ = counted_logits(forward, batch, config.positions)
        check_finite(logits)
        return batch, logits.cpu()

    batches = plan_batches([len(sample["input_ids"]) for sample in features], config.batch_size)
    unchanged = [result for _, result in run_batches(batches, features, collate, run)]

    @torch.no_grad()
    def kl(steps: Sequence[Scaled]) -> float:
        values: list[Tensor] = []
        with applied(weights, steps):
            for batch, before in unchanged:
                after, counted = counted_logits(forward, batch, config.positions)
                # Go one sample at a time: two fp32 distributions over the vocabulary take a lot of memory.
                for base, changed, mask in zip(before, after, counted, strict=True):
                    log_p = torch.log_softmax(base[mask.cpu()].to(after.device).float(), dim=-1)
                    log_q = torch.log_softmax(changed[mask].float(), dim=-1)
                    values.append((log_p.exp() * (log_p - log_q)).sum(dim=-1).double().mean())  # eq. 15
        return torch.stack(values).mean().item()

    return kl
