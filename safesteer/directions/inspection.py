"""Inspect a direction: what it says, where it lives, which components write it.

    logit_lens               top and bottom tokens through final norm and unembedding (TransformerLens's
                             logit_readout), one vector per layer
    cosines                  between the candidates of all layers and positions
    component_contributions  which attention heads and MLPs write it: the projection of every component's
                             output on the direction, averaged harmful minus harmless (direct logit
                             attribution, with the direction in place of an unembedding column)
    residual_pca             first two principal components of the residuals of each layer, with the
                             direction drawn in
    probe_accuracy           how well a few coordinates of the residual tell harmful from harmless, held
                             out, beside shuffled labels (TransformerLens's sweep_sparse_probe)

All return plain tables; `report.direction_figures` draws them.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias, cast

import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor, nn

from safesteer._errors import SafeSteerError
from safesteer.directions.activations import last_resid_pre, prefill_shared
from safesteer.directions.candidates import Candidates
from safesteer.models.batch import PromptBatch
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.forward import final_hidden
from safesteer.models.head import normed, output_head, tolerance
from safesteer.models.logits import logits_of
from safesteer.models.parts import blocks, hf_model, is_quantized
from safesteer.models.placement import weights_in
from safesteer.prompts.prompt_set import LABELS, PromptSet
from safesteer.steering.direction import Direction
from safesteer.steering.hooks import Edit, Edits, apply_hooks

Component: TypeAlias = tuple[str, int, int]  # kind ("embed", "head" or "mlp"), layer, head; -1 for none
HALF_TOLERANCE = 0.1  # of the largest part, below float32, where sums of parts round


def logit_lens(chat: ModelLike, vectors: Float[Tensor, "n d_model"], *, k: int = 10) -> pd.DataFrame:
    """Read vectors through the final norm and the unembedding: the tokens that each raises or lowers most.

    A vector is read as if it were a whole residual stream: a rank order to look at, not an effect size.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        vectors: [n, d_model], such as `direction.vector[None]`.
        k: Tokens at either end.

    Returns:
        Columns: row (of `vectors`; the layer, if they are one per layer), end ("top" or "bottom"), rank,
        token_id, text, logit.

    Example:
        >>> from safesteer.directions.inspection import logit_lens
        >>> table = logit_lens(chat, direction.vector[None], k=3)
        >>> table.end.tolist()
        ['top', 'top', 'top', 'bottom', 'bottom', 'bottom']
    """
    chat, rows = as_chat(chat), []
    logits = logits_of(normed(chat.model, vectors.to(chat.device)), *output_head(chat.model))
    for end, largest in (("top", True), ("bottom", False)):
        best = logits.topk(k, largest=largest)
        for row, (values, ids) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            for rank, (token_id, logit) in enumerate(zip(ids, values, strict=True), start=1):
                rows.append((row, end, rank, token_id, chat.decode([token_id]), logit))
    return pd.DataFrame(rows, columns=["row", "end", "rank", "token_id", "text", "logit"])


def cosines(candidates: Candidates) -> pd.DataFrame:
    """Compute the cosine between every two candidates.

    Returns:
        A square table; rows and columns are labels "position @ layer".
    """
    flat = rearrange(candidates.vectors, "pos layer d -> (pos layer) d").double()
    unit = flat / flat.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    n_layers = candidates.vectors.shape[1]
    labels = [f"{p} @ {layer}" for p in candidates.positions for layer in range(n_layers)]
    return pd.DataFrame((unit @ unit.T).numpy(), index=labels, columns=labels)


@torch.no_grad()
def component_contributions(
    chat: ModelLike, direction: Direction, prompts: PromptSet, *, batch_size: int = 32
) -> pd.DataFrame:
    """Measure which components write the direction at the last prompt position.

    Attention is split into heads before the output projection (its bias is not a head's). The embedding
    and all components below block l add up to the projection of resid_pre[l].

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        direction: Outputs are projected on its unit vector.
        prompts: Harmful and harmless prompts.
        batch_size: Prompts per forward pass.

    Returns:
        Columns: component ("embed", "L3.H5", "L3.mlp"), kind, layer, head (-1 for none), harmful and
        harmless (mean projection in residual units) and difference.

    Raises:
        SafeSteerError: Where these components do not add up to the residual stream: models that normalise or
            scale what a sublayer writes (Gemma 2 and 3, Granite), or write with other parts too; for
            quantized weights, which are not split into heads.

    Example:
        >>> from safesteer.directions.inspection import component_contributions
        >>> prompts = ss.load_prompts().split("val").first(2)
        >>> table = component_contributions(chat, direction, prompts)
        >>> table.component.iloc[0], set(table.kind) == {"embed", "head", "mlp"}
        ('embed', True)
    """
    chat = as_chat(chat)
    prompts.require_kinds()
    if is_quantized(chat.model):
        raise SafeSteerError(
            "Heads are split by the weights of their projection, which are quantized here: load the model"
            " without quantize."
        )
    plain = ChatModel(hf_model(chat.model), chat.tokenizer, chat.name)
    unit = direction.unit.to(chat.device).double()
    harmful, harmless = (_mean_written(plain, prompts.texts(label), unit, batch_size) for label in LABELS)
    rows = [(_name(*at), *at, harmful[at], harmless[at]) for at in harmful]
    table = pd.DataFrame(rows, columns=["component", "kind", "layer", "head", *LABELS])
    return table.assign(difference=table.harmful - table.harmless)


def _name(kind: str, layer: int, head: int) -> str:
    """Return the name of a component."""
    return {"embed": "embed", "mlp": f"L{layer}.mlp", "head": f"L{layer}.H{head}"}[kind]


def _mean_written(
    chat: ChatModel, texts: Sequence[str], unit: Float[Tensor, " d_model"], batch_size: int
) -> dict[Component, float]:
    """Average each component's projection at the last position over prompts."""
    total: dict[Component, float] = {}
    for _, batch in chat.batched(texts, batch_size):
        for component, value in _written(chat, batch, unit).items():
            total[component] = total.get(component, 0.0) + value
    return {component: value / len(texts) for component, value in total.items()}


def _written(chat: ChatModel, batch: PromptBatch, unit: Float[Tensor, " d_model"]) -> dict[Component, float]:
    """Sum each component's projection at the last position over the prompts of a batch."""
    written: dict[Component, float] = {}
    before: dict[int, float] = {}  # projection of each block's resid_pre
    biases: dict[int, float] = {}

    def along(x: Tensor) -> float:
        return float((x[:, -1].to(unit) @ unit).sum())

    def read_heads(layer: int, width: int, through: Tensor) -> Callable[[nn.Module, tuple], None]:
        def project(module: nn.Module, args: tuple) -> None:
            z = rearrange(args[0][:, -1].to(unit), "b (head d) -> b head d", d=width)
            for head, value in enumerate(einsum(z, through, "b head d, head d -> head").tolist()):
                written["head", layer, head] = value

        return project

    def read_mlp(layer: int) -> Callable[[nn.Module, tuple, Any], None]:
        def project(module: nn.Module, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
            # Experts may return their router's scores too.
            written["mlp", layer, -1] = along(output if isinstance(output, Tensor) else output[0])

        return project

    def read_before(layer: int) -> Edit:
        return lambda h: before.update({layer: along(h)})

    cache = prefill_shared(chat, batch)
    with ExitStack() as stack:
        for layer, block in enumerate(blocks(chat.model)):
            out, width, mlp = _parts(block)
            with weights_in(out):  # a bridge's part has them of the module that it wraps
                through = rearrange(cast(Tensor, out.weight).to(unit).T @ unit, "(head d) -> head d", d=width)
                bias = cast(Tensor | None, getattr(out, "bias", None))
                biases[layer] = 0.0 if bias is None else len(batch.prompt_ids) * float(bias.to(unit) @ unit)
            stack.callback(out.register_forward_pre_hook(read_heads(layer, width, through)).remove)
            stack.callback(mlp.register_forward_hook(read_mlp(layer)).remove)
        edits: Edits = {("resid_pre", layer): read_before(layer) for layer in range(chat.n_layers)}
        with apply_hooks(chat, edits):
            final_hidden(chat.model, batch, cache)
    _check_sum(chat, written, before, biases)
    return {("embed", -1, -1): before[0], **written}


def _parts(block: nn.Module) -> tuple[nn.Module, int, nn.Module]:
    """Return the projection that mixes the heads, the width of a head, and the MLP."""
    attention, mlp = getattr(block, "self_attn", None), getattr(block, "mlp", None)
    out = getattr(attention, "o_proj", None) or getattr(attention, "dense", None)
    width = getattr(attention, "head_dim", None)
    if out is None or width is None or mlp is None:
        raise SafeSteerError(
            f"The parts of a {type(block).__name__} have no names that are known here, so what it writes is"
            " not split into heads and MLP."
        )
    return out, width, mlp


def _check_sum(
    chat: ChatModel, written: dict[Component, float], before: dict[int, float], biases: dict[int, float]
) -> None:
    """Raise SafeSteerError where the components below a block do not add up to its resid_pre."""
    total, size = before[0], max(map(abs, (*before.values(), *written.values())))
    limit = size * tolerance(next(chat.model.parameters()).dtype, HALF_TOLERANCE)
    for layer in range(chat.n_layers - 1):
        total += biases[layer] + sum(value for at, value in written.items() if at[1] == layer)
        if abs(total - before[layer + 1]) > limit:
            raise SafeSteerError(
                f"The heads and the MLP of block {layer} of '{chat.name}' do not add up to what it writes, so"
                " its output is not split into components."
            )


def residual_pca(
    chat: ModelLike,
    prompts: PromptSet,
    direction: Direction | None = None,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Project the residuals of the last prompt position on each layer's first two principal components.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        prompts: Harmful and harmless prompts.
        direction: Drawn as one more point: its unit vector, scaled to the distance of the two means, from
            the centre of all points.
        layers: None: all.
        batch_size: Prompts per forward pass.

    Returns:
        Columns: layer, label ("harmful", "harmless" or "direction"), text, pc1, pc2, explained (share of
        variance of both components).
    """
    chat = as_chat(chat)
    texts, n_harmful = [*prompts.harmful, *prompts.harmless], len(prompts.harmful)
    labels = ["harmful"] * n_harmful + ["harmless"] * (len(texts) - n_harmful)
    resid_pre, rows = last_resid_pre(chat, [*prompts.harmful, *prompts.harmless], batch_size), []
    for layer in range(chat.n_layers) if layers is None else layers:
        x = resid_pre[:, layer]
        centred = x - x.mean(0)
        _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
        explained = float((sizes[:2] ** 2).sum() / (sizes**2).sum().clamp(min=1e-30))
        points = centred @ axes[:2].T
        for label, text, (pc1, pc2) in zip(labels, texts, points.tolist(), strict=True):
            rows.append((layer, label, text, pc1, pc2, explained))
        if direction is not None:
            gap = (x[:n_harmful].mean(0) - x[n_harmful:].mean(0)).norm()
            pc1, pc2 = (axes[:2] @ (direction.unit.double().cpu() * gap)).tolist()
            rows.append((layer, "direction", "", pc1, pc2, explained))
    return pd.DataFrame(rows, columns=["layer", "label", "text", "pc1", "pc2", "explained"])


@torch.no_grad()
def probe_accuracy(
    chat: ModelLike,
    prompts: PromptSet,
    *,
    layers: Sequence[int] | None = None,
    ks: Sequence[int] = (1, 8, 64),
    n_shuffles: int = 3,
    batch_size: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure the held-out accuracy of sparse probes on the residual at the last prompt position.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        prompts: Harmful and harmless prompts; matched pairs are held out whole.
        layers: None: all.
        ks: Numbers of coordinates that a probe may use; those above d_model are left out.
        n_shuffles: Probes with shuffled training labels.
        batch_size: Prompts per forward pass.
        seed: Seed of the held-out share and of the shuffled labels.

    Returns:
        Columns: layer, k, accuracy, shuffled (mean accuracy with shuffled training labels: what a probe of
        that size reaches by chance).
    """
    from transformer_lens.tools.analysis import sweep_sparse_probe  # slow to import

    chat = as_chat(chat)
    n_harmful, n_harmless = len(prompts.harmful), len(prompts.harmless)
    labels = torch.tensor([1] * n_harmful + [0] * n_harmless)
    names = [p.pair or f"#{i}" for label in LABELS for i, p in enumerate(prompts.prompts) if p.label == label]
    groups = torch.tensor(pd.factorize(pd.Series(names))[0])
    resid_pre, rows = last_resid_pre(chat, [*prompts.harmful, *prompts.harmless], batch_size), []
    ks = [k for k in ks if k <= chat.d_model]
    for layer in range(chat.n_layers) if layers is None else layers:
        probes = sweep_sparse_probe(
            resid_pre[:, layer].float(),
            labels,
            ks=ks,
            groups=groups,
            preprocess="standardize",
            n_label_shuffles=n_shuffles,
            seed=seed,
        )
        for k, probe, control in zip(ks, probes.results, probes.label_shuffle_controls, strict=True):
            rows.append((layer, k, probe.metrics.accuracy, float(control.accuracy.mean())))
    return pd.DataFrame(rows, columns=["layer", "k", "accuracy", "shuffled"])
