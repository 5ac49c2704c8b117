"""Extraction: candidate directions read from residual streams, one vector a position and layer.

Every extraction contrasts two arms A and B of texts and reads `resid_pre` through hooks:

    mean_difference     harmful against harmless prompts, at every post-instruction position
                        (Arditi et al. 2024, 2.3; paper section 3.2)
    prefill_contrast    harmful prompts, continued by a refusal against a compliance, mean over the
                        continuation: for models that do not refuse by themselves
    system_contrast     harmful prompts under a refusing against a helpful system prompt
    pca_difference      first principal component of the differences of matched pairs
    logistic_probe      weights of a logistic regression, harmful against harmless

Each is a function (chat, prompts, *, batch_size, seed) -> Candidates; writing another is writing
one function. Beside the vectors each returns those of the same activations with shuffled labels.
Principal components and probes have no length of their own: theirs is the distance between the
means of the arms along them, so that coefficient 1 means the same everywhere.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from safesteer._errors import SafeSteerError
from safesteer.directions.refusal_tokens import COMPLIANCES, COMPLYING_SYSTEM, REFUSALS, REFUSING_SYSTEM
from safesteer.models.batch import PromptBatch, batches, suffix_length, template_hash
from safesteer.models.chat_model import ChatModel
from safesteer.models.forward import final_hidden, prefill
from safesteer.prompts.prompt_set import PromptSet
from safesteer.steering.direction import Direction
from safesteer.steering.hooks import record_resid_pre


@dataclass(frozen=True, eq=False)
class Candidates:
    """One vector for each position x layer. `positions` are labels such as "-1" or "mean".

    `shuffled` holds what the same extraction finds in the same activations when the labels are
    shuffled: a control. None where there were no labels.
    """

    vectors: Float[Tensor, "n_pos n_layers d_model"]
    positions: tuple[str, ...]
    extraction: str
    shuffled: Float[Tensor, "n_pos n_layers d_model"] | None = None

    def direction(
        self,
        chat: ChatModel,
        position: str,
        layer: int,
        *,
        coeff: float = 1.0,
        prompts: PromptSet | None = None,
    ) -> Direction:
        """The candidate at (position, layer), stamped with the model it belongs to."""
        return Direction(
            vector=self.vectors[self.positions.index(position), layer].cpu(),
            layer=layer,
            position=position,
            extraction=self.extraction,
            coeff=coeff,
            model=chat.name,
            fingerprint=chat.fingerprint,
            template_hash=template_hash(chat.tokenizer),
            prompts_hash=prompts.hash if prompts else "",
        )

    def __repr__(self) -> str:
        n_pos, n_layers, d_model = self.vectors.shape
        return f"Candidates({self.extraction}: {n_pos} positions x {n_layers} layers, d_model {d_model})"


@dataclass(frozen=True)
class Arm:
    """One side of a contrast: texts, with what the model reads around them."""

    texts: Sequence[str]
    continuations: Sequence[str] | None = None  # one a text; given, their mean is read
    system: str | None = None


def activations(
    chat: ChatModel, arm: Arm, batch_size: int = 32
) -> Iterator[tuple[list[int], Float[Tensor, "batch n_pos n_layers d_model"]]]:
    """resid_pre of every layer at the arm's positions, batch by batch, with the rows it is of.

    Positions are the post-instruction ones, or the mean over the continuation. The columns that
    prompts share are read before, so that hooks see whole rows; nothing else is kept. Raises
    SafeSteerError where they are not finite.
    """
    n_pos, layers = suffix_length(chat.tokenizer), list(range(chat.n_layers))
    for rows in batches(chat.tokenizer, arm.texts, batch_size, system=arm.system):
        tails = None if arm.continuations is None else [arm.continuations[i] for i in rows]
        texts = [arm.texts[i] for i in rows]
        batch = PromptBatch.of(chat.tokenizer, texts, tails, system=arm.system, device=chat.device)

        def read(h: Tensor, batch: PromptBatch = batch, whole: bool = tails is None) -> Tensor:
            if whole:
                return h[:, -n_pos:].clone()  # a view would keep every position alive
            weight = batch.completion_mask[:, -h.shape[1] :].double()
            weight = weight / weight.sum(-1, keepdim=True)
            return einsum(weight, h.double(), "b pos, b pos d -> b d")[:, None]

        with torch.no_grad():
            cache = prefill(chat.model, batch, batch.n_shared) if batch.n_shared else None
        with record_resid_pre(chat.model, layers, read) as seen:
            final_hidden(chat.model, batch, cache)
        found = torch.stack([seen[layer] for layer in layers], dim=2)
        _check_finite(chat, found, texts)
        yield rows, found


def _check_finite(
    chat: ChatModel, found: Float[Tensor, "batch n_pos n_layers d_model"], texts: Sequence[str]
) -> None:
    """Raise SafeSteerError naming the first layer that overflowed, and a prompt on which it did."""
    bad = ~found.isfinite().all(-1).all(1)
    if bool(bad.any()):
        layer = int(bad.any(0).int().argmax())
        prompt = texts[int(bad[:, layer].int().argmax())]
        raise SafeSteerError(
            f"resid_pre of layer {layer} of '{chat.name}' is not finite on the prompt {prompt[:80]!r}: its"
            " weights are damaged, or its activations do not fit its precision (try dtype='bfloat16' or"
            " 'float32')."
        )


def _halves(n: int, seed: int) -> Float[Tensor, " n"]:
    """+1 for a random half of n items and -1 for the others."""
    sign = torch.ones(n, dtype=torch.float64)
    sign[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 2]] = -1
    return sign


def _mean_contrast(chat: ChatModel, a: Arm, b: Arm, batch_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """mean(A) - mean(B), and the same with shuffled labels, in one pass a batch.

    Accumulated in float64: residual norms grow with depth and float32 sums lose the difference.
    """
    if not a.texts or not b.texts:
        raise SafeSteerError("There are no prompts to read a direction from.")
    signs = [_halves(len(arm.texts), seed + i) for i, arm in enumerate((a, b))]
    n_plus = sum(int((s > 0).sum()) for s in signs)
    n_minus = sum(len(s) for s in signs) - n_plus
    total: Tensor | float = 0.0
    for arm, label, sign in zip((a, b), (1, -1), signs, strict=True):
        shuffled = torch.where(sign > 0, 1 / n_plus, -1 / max(1, n_minus))
        weights = torch.stack([torch.full_like(sign, label / len(sign)), shuffled])
        for rows, h in activations(chat, arm, batch_size):
            w = weights[:, rows].to(h.device)
            total = total + einsum(w, h.double(), "k b, b pos layer d -> k pos layer d")
    assert isinstance(total, Tensor)
    return total[0].float(), total[1].float()


def _positions(chat: ChatModel) -> tuple[str, ...]:
    return tuple(str(i) for i in range(-suffix_length(chat.tokenizer), 0))


def mean_difference(
    chat: ChatModel, prompts: PromptSet, *, batch_size: int = 32, seed: int = 0
) -> Candidates:
    """Harmful minus harmless mean of resid_pre, at every post-instruction position and layer."""
    arms = Arm(prompts.harmful), Arm(prompts.harmless)
    vectors, shuffled = _mean_contrast(chat, *arms, batch_size, seed)
    return Candidates(vectors, _positions(chat), "instruction", shuffled)


def prefill_contrast(
    chat: ChatModel,
    prompts: PromptSet,
    *,
    batch_size: int = 32,
    seed: int = 0,
    refusals: tuple[str, ...] = REFUSALS,
    compliances: tuple[str, ...] = COMPLIANCES,
) -> Candidates:
    """Refusing minus complying continuations of the same harmful prompts, mean over positions.

    The texts of the lists take turns.
    """
    texts = prompts.harmful
    arms = [Arm(texts, [c[i % len(c)] for i in range(len(texts))]) for c in (refusals, compliances)]
    vectors, shuffled = _mean_contrast(chat, *arms, batch_size, seed)
    return Candidates(vectors, ("mean",), "prefill", shuffled)


def system_contrast(
    chat: ChatModel,
    prompts: PromptSet,
    *,
    batch_size: int = 32,
    seed: int = 0,
    refusing: str = REFUSING_SYSTEM,
    complying: str = COMPLYING_SYSTEM,
) -> Candidates:
    """The same harmful prompts under a refusing minus under a helpful system prompt."""
    arms = Arm(prompts.harmful, system=refusing), Arm(prompts.harmful, system=complying)
    vectors, shuffled = _mean_contrast(chat, *arms, batch_size, seed)
    return Candidates(vectors, _positions(chat), "system", shuffled)


def _stacked(chat: ChatModel, arm: Arm, batch_size: int) -> Float[Tensor, "n n_pos n_layers d_model"]:
    """All activations of an arm, in the order of its texts, in float64 on the CPU."""
    found: Tensor | None = None
    for rows, h in activations(chat, arm, batch_size):
        if found is None:
            found = torch.zeros((len(arm.texts), *h.shape[1:]), dtype=torch.float64)
        found[rows] = h.double().cpu()
    assert found is not None
    return found


def _by_cell(
    a: Float[Tensor, "n n_pos n_layers d_model"],
    b: Float[Tensor, "n n_pos n_layers d_model"],
    axis_of: Callable[[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]], Tensor],
) -> Float[Tensor, "n_pos n_layers d_model"]:
    """axis_of(A, B) at every position and layer, as long as mean(A) - mean(B) is along it."""
    vectors = torch.zeros(a.shape[1:], dtype=torch.float64)
    for pos in range(a.shape[1]):
        for layer in range(a.shape[2]):
            here = a[:, pos, layer], b[:, pos, layer]
            axis = axis_of(*here)
            axis = axis / axis.norm().clamp(min=1e-30)
            vectors[pos, layer] = axis * (axis @ (here[0].mean(0) - here[1].mean(0)))
    return vectors.float()


def _both(chat, prompts, axis_of, name, batch_size, seed) -> Candidates:
    if not prompts.harmful or not prompts.harmless:
        raise SafeSteerError("There are no prompts to read a direction from.")
    a, b = (_stacked(chat, Arm(t), batch_size) for t in (prompts.harmful, prompts.harmless))
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    # Over both arms: a principal component does not see a swap inside a pair.
    deal = torch.randperm(2 * n, generator=torch.Generator().manual_seed(seed))
    first, second = torch.cat([a, b])[deal].split(n)
    shuffled = _by_cell(first, second, axis_of)
    return Candidates(_by_cell(a, b, axis_of), _positions(chat), name, shuffled)


def pca_difference(chat: ChatModel, prompts: PromptSet, *, batch_size: int = 32, seed: int = 0) -> Candidates:
    """First principal component of harmful minus harmless, pair by pair and not centred.

    The prompts are taken as pairs in their order; all activations are kept (float64, on the CPU).
    """

    def axis(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.svd(a - b, full_matrices=False).Vh[0]

    return _both(chat, prompts, axis, "pca", batch_size, seed)


def logistic_probe(
    chat: ChatModel, prompts: PromptSet, *, batch_size: int = 32, seed: int = 0, C: float = 0.1
) -> Candidates:
    """Weights of a logistic regression, in the residual stream's own units.

    scikit-learn on standardized activations with inverse regularization strength `C`.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import
    from sklearn.preprocessing import StandardScaler

    def axis(a: Tensor, b: Tensor) -> Tensor:
        scaler = StandardScaler()
        x = scaler.fit_transform(torch.cat([a, b]).numpy())
        y = [1] * len(a) + [0] * len(b)
        probe = LogisticRegression(C=C, max_iter=1000).fit(x, y)
        return torch.from_numpy(probe.coef_[0] / scaler.scale_)

    return _both(chat, prompts, axis, "probe", batch_size, seed)


def from_vector(
    chat: ChatModel, vector: Float[Tensor, " d_model"] | Float[Tensor, "n_layers d_model"]
) -> Candidates:
    """A vector of your own: one for all layers, or one a layer. It has no labels to shuffle."""
    if vector.shape[-1] != chat.d_model or (vector.dim() == 2 and len(vector) != chat.n_layers):
        raise SafeSteerError(
            f"A vector of shape {tuple(vector.shape)} does not fit '{chat.name}': give [{chat.d_model}], or"
            f" [{chat.n_layers}, {chat.d_model}] for one a layer."
        )
    vectors = vector.float().expand(chat.n_layers, -1).clone()[None]
    return Candidates(vectors, ("given",), "given")
