"""Reading a direction: what it says, where it lives, who writes it.

    logit_lens      top and bottom tokens through final norm and unembedding (TransformerLens's
                   logit_readout), one vector a layer
    cosines        between the candidates of all layers and positions
    writers        which attention heads and MLPs write it: the projection of every component's
                   output on the direction, averaged harmful minus harmless
    residual_pca   first two principal components of the residuals of each layer, with the direction
                   drawn in
    representation_shift   where the final hidden states of base, teacher and student lie (Figure 3)
    probe_accuracy   how well a few coordinates of the residual tell harmful from harmless, held out,
                   beside shuffled labels (TransformerLens's sweep_sparse_probe)

All return plain tables; `attribution.direction_figures` draws them.
"""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer.directions.extraction import Arm, Candidates, activations
from safesteer.models.batch import PromptBatch
from safesteer.models.bridge import to_bridge
from safesteer.models.chat_model import ChatModel, blocks, hf_model, is_bridge
from safesteer.models.forward import final_hidden, prefill
from safesteer.prompts.prompt_set import PromptSet
from safesteer.steering.direction import Direction
from safesteer.steering.hooks import apply_hooks


def logit_lens(chat: ChatModel, vectors: Float[Tensor, "n d_model"], *, k: int = 10) -> pd.DataFrame:
    """The k tokens that each vector raises most and the k it lowers most.

    Columns: row (of `vectors`; the layer, if they are one a layer), end ("top" or "bottom"), rank,
    token_id, text, logit. The vector is read through the final norm, as if it were a whole residual
    stream: a rank order to look at, not an effect size. `chat` may be plain or a bridge.
    """
    from transformer_lens.tools.analysis import logit_readout  # slow to import

    bridge = to_bridge(chat)
    rows = []
    for end, sign in (("top", 1), ("bottom", -1)):
        found = logit_readout(bridge, sign * vectors.to(chat.device), top_k=k)
        ids, logits = found.top_ids, found.values
        assert ids is not None
        for row in range(len(vectors)):
            for rank in range(k):
                token = int(ids[row, rank])
                text = chat.tokenizer.decode([token])  # type: ignore[attr-defined]
                logit = sign * float(logits[row, rank])
                rows.append((row, end, rank + 1, token, text, logit))
    return pd.DataFrame(rows, columns=["row", "end", "rank", "token_id", "text", "logit"])


def cosines(candidates: Candidates) -> pd.DataFrame:
    """Cosine between every two candidates: rows and columns are labels "position @ layer"."""
    flat = rearrange(candidates.vectors, "pos layer d -> (pos layer) d").double()
    unit = flat / flat.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    n_layers = candidates.vectors.shape[1]
    labels = [f"{p} @ {layer}" for p in candidates.positions for layer in range(n_layers)]
    return pd.DataFrame((unit @ unit.T).numpy(), index=labels, columns=labels)


def _attention_out(block: torch.nn.Module) -> tuple[torch.nn.Module, int]:
    """The projection that mixes the heads, and the width of one head."""
    attention = block.self_attn
    out = getattr(attention, "o_proj", None) or getattr(attention, "dense", None)
    if out is None:
        raise SafeSteerError("This architecture's attention has no output projection that is known here.")
    return out, int(attention.head_dim)  # type: ignore[arg-type]


@torch.no_grad()
def component_contributions(
    chat: ChatModel, direction: Direction, prompts: PromptSet, *, batch_size: int = 32
) -> pd.DataFrame:
    """Who writes the direction at the last prompt position, in residual units.

    Columns: component ("embed", "L3.H5", "L3.mlp"), kind, layer, head (-1 for none), harmful and
    harmless (mean projection of its output on the unit direction) and difference. Attention is
    split into heads before the output projection (its bias, and a norm after it, are not a head's;
    sandwich-norm models are refused). The embedding and all components below block l add up to the
    projection of resid_pre[l].
    """
    if is_bridge(chat.model):
        chat = ChatModel(hf_model(chat.model), chat.tokenizer, chat.name)
    if hasattr(blocks(chat.model)[0], "post_feedforward_layernorm"):
        raise SafeSteerError(
            f"'{chat.name}' normalises what a sublayer writes, so its output is not a sum over heads."
        )
    unit = direction.unit.to(chat.device)
    means = {}
    for label, texts in (("harmful", prompts.harmful), ("harmless", prompts.harmless)):
        total: dict[tuple[str, int, int], float] = {}
        for rows, batch in chat.batched(texts, batch_size):
            for key, value in _written(chat, batch, unit).items():
                total[key] = total.get(key, 0.0) + value
        means[label] = {key: value / len(texts) for key, value in total.items()}
    table = pd.DataFrame(
        [
            {
                "component": _component(*key),
                "kind": key[0],
                "layer": key[1],
                "head": key[2],
                "harmful": means["harmful"][key],
                "harmless": means["harmless"][key],
            }
            for key in means["harmful"]
        ]
    )
    return table.assign(difference=table.harmful - table.harmless)


def _component(kind: str, layer: int, head: int) -> str:
    return {"embed": "embed", "mlp": f"L{layer}.mlp", "head": f"L{layer}.H{head}"}[kind]


def _written(chat: ChatModel, batch: PromptBatch, unit: Tensor) -> dict[tuple[str, int, int], float]:
    """Sum over prompts of each component's projection at the last position."""
    found: dict[tuple[str, int, int], float] = {}

    def keep(key: tuple[str, int, int]):
        def read(x: Tensor) -> None:
            found[key] = float((x[:, -1].double() @ unit.double()).sum())

        return read

    def heads(layer: int):
        out, width = _attention_out(blocks(chat.model)[layer])
        through = rearrange(out.weight.double().T @ unit.double(), "(head d) -> head d", d=width)  # type: ignore[union-attr]

        def read(module, args) -> None:
            z = rearrange(args[0][:, -1].double(), "b (head d) -> b head d", d=width)
            for head, value in enumerate(einsum(z, through, "b head d, head d -> head").tolist()):
                found[("head", layer, head)] = value

        return out.register_forward_pre_hook(read)

    with torch.no_grad():  # the shared columns are read before, so that hooks see whole rows
        cache = prefill(chat.model, batch, batch.n_shared) if batch.n_shared else None
    edits = {("mlp_out", i): keep(("mlp", i, -1)) for i in range(chat.n_layers)}
    handles = [heads(layer) for layer in range(chat.n_layers)]
    try:
        with apply_hooks(chat.model, {("resid_pre", 0): keep(("embed", -1, -1)), **edits}):  # type: ignore[dict-item]
            final_hidden(chat.model, batch, cache)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _last(chat: ChatModel, texts: Sequence[str], batch_size: int) -> Float[Tensor, "n n_layers d_model"]:
    """resid_pre at the last prompt position of every text and layer, float64 on the CPU."""
    found = torch.zeros((len(texts), chat.n_layers, chat.d_model), dtype=torch.float64)
    for rows, h in activations(chat, Arm(texts), batch_size):
        found[rows] = h[:, -1].double().cpu()
    return found


def residual_pca(
    chat: ChatModel,
    prompts: PromptSet,
    direction: Direction | None = None,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 32,
) -> pd.DataFrame:
    """Residuals of the last prompt position in the first two principal components of each layer.

    Columns: layer, label ("harmful", "harmless", "direction"), text, pc1, pc2, explained (share of
    variance of both components). The row "direction" is the unit direction, scaled to the distance
    of the two means, from the centre of all points.
    """
    texts = [*prompts.harmful, *prompts.harmless]
    labels = ["harmful"] * len(prompts.harmful) + ["harmless"] * len(prompts.harmless)
    residuals, rows = _last(chat, texts, batch_size), []
    harmful = torch.tensor([x == "harmful" for x in labels])
    for layer in range(chat.n_layers) if layers is None else layers:
        x = residuals[:, layer]
        centred = x - x.mean(0)
        _, spread, axes = torch.linalg.svd(centred, full_matrices=False)
        explained = float((spread[:2] ** 2).sum() / (spread**2).sum().clamp(min=1e-30))
        points = centred @ axes[:2].T
        for label, text, (pc1, pc2) in zip(labels, texts, points.tolist(), strict=True):
            rows.append((layer, label, text, pc1, pc2, explained))
        if direction is not None:
            gap = (x[harmful].mean(0) - x[~harmful].mean(0)).norm()
            pc1, pc2 = (axes[:2] @ (direction.unit.double().cpu() * gap)).tolist()
            rows.append((layer, "direction", "", pc1, pc2, explained))
    return pd.DataFrame(rows, columns=["layer", "label", "text", "pc1", "pc2", "explained"])


@torch.no_grad()
def representation_shift(
    models: Mapping[str, ChatModel], prompts: Sequence[str], *, batch_size: int = 32
) -> pd.DataFrame:
    """Final hidden states at the last prompt position, in the first model's principal plane (Figure 3).

    Columns: model, text, pc1, pc2, explained (share of the first model's variance in the plane), shift:
    the distance of a model's mean from the first model's, in units of the first model's spread (root
    mean squared distance from its mean). A model that carries hooks (`steer`) is read with them.
    """
    rows, reference = [], None
    for name, chat in models.items():
        states = torch.zeros((len(prompts), chat.d_model), dtype=torch.float64)
        for at, batch in chat.batched(prompts, batch_size):
            states[at] = final_hidden(chat.model, batch)[:, -1].double().cpu()
        if reference is None:
            centre = states.mean(0)
            _, sizes, axes = torch.linalg.svd(states - centre, full_matrices=False)
            spread = (states - centre).pow(2).sum(-1).mean().sqrt().clamp(min=1e-30)
            explained = float((sizes[:2] ** 2).sum() / (sizes**2).sum().clamp(min=1e-30))
            reference = centre, axes[:2], spread, explained
        centre, plane, spread, explained = reference
        shift = float((states.mean(0) - centre).norm() / spread)
        points = ((states - centre) @ plane.T).tolist()
        rows += [(name, t, x, y, explained, shift) for t, (x, y) in zip(prompts, points, strict=True)]
    return pd.DataFrame(rows, columns=["model", "text", "pc1", "pc2", "explained", "shift"])


def probe_accuracy(
    chat: ChatModel,
    prompts: PromptSet,
    *,
    layers: Sequence[int] | None = None,
    ks: Sequence[int] = (1, 8, 64),
    n_shuffles: int = 3,
    batch_size: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """Held-out accuracy of sparse probes on the residual at the last prompt position.

    Columns: layer, k (coordinates the probe may use), accuracy, shuffled (mean accuracy with shuffled
    training labels: what a probe of that size finds in nothing). Matched pairs are held out whole.
    """
    from transformer_lens.tools.analysis import sweep_sparse_probe  # slow to import

    texts = [*prompts.harmful, *prompts.harmless]
    n = len(prompts.harmful), len(prompts.harmless)
    labels = torch.tensor([1] * n[0] + [0] * n[1])
    groups = torch.tensor([*range(n[0]), *range(n[1])])
    residuals, rows = _last(chat, texts, batch_size), []
    ks = [k for k in ks if k <= chat.d_model]
    for layer in range(chat.n_layers) if layers is None else layers:
        found = sweep_sparse_probe(
            residuals[:, layer].float(),
            labels,
            ks=ks,
            groups=groups,
            preprocess="standardize",
            n_label_shuffles=n_shuffles,
            seed=seed,
        )
        for k, probe, control in zip(ks, found.results, found.label_shuffle_controls, strict=True):
            rows.append((layer, k, probe.metrics.accuracy, float(control.accuracy.mean())))
    return pd.DataFrame(rows, columns=["layer", "k", "accuracy", "shuffled"])
