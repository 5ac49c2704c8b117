"""Extraction: candidate directions read from residual streams, one vector per position and layer.

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
Principal components and probes have no length of their own: they get the distance between the
means of the arms along them, so that coefficient 1 means the same everywhere.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from safesteer._errors import SafeSteerError, expect
from safesteer.directions.activations import Arm, read_activations
from safesteer.directions.candidates import Candidates
from safesteer.directions.refusal_tokens import COMPLIANCES, COMPLYING_SYSTEM, REFUSALS, REFUSING_SYSTEM
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.templates import suffix_length
from safesteer.prompts.prompt_set import PromptSet

# The axis on which two arms differ, at one position and layer.
AxisOf: TypeAlias = Callable[[Float[Tensor, "n d_model"], Float[Tensor, "n d_model"]], Tensor]


def _random_signs(n: int, seed: int) -> Float[Tensor, " n"]:
    """Draw +1 for a random half of n items and -1 for the others."""
    sign = torch.ones(n, dtype=torch.float64)
    sign[torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: n // 2]] = -1
    return sign


def _mean_contrast(
    chat: ChatModel, a: Arm, b: Arm, batch_size: int, seed: int
) -> tuple[Float[Tensor, "n_pos n_layers d_model"], Float[Tensor, "n_pos n_layers d_model"]]:
    """Compute mean(A) - mean(B), and the same with shuffled labels, from one pass per batch.

    Accumulated in float64: residual norms grow with depth and float32 sums lose the difference. Returned on
    the CPU, where candidates are.
    """
    if not a.texts or not b.texts:
        raise SafeSteerError("There are no prompts to read a direction from.")
    signs = [_random_signs(len(arm.texts), seed + i) for i, arm in enumerate((a, b))]
    n_plus = sum(int((sign > 0).sum()) for sign in signs)
    n_minus = sum(len(sign) for sign in signs) - n_plus
    total = torch.zeros(())
    for arm, label, sign in zip((a, b), (1, -1), signs, strict=True):
        shuffled = torch.where(sign > 0, 1 / n_plus, -1 / max(1, n_minus))
        weights = torch.stack([torch.full_like(sign, label / len(sign)), shuffled])
        for rows, h in read_activations(chat, arm, batch_size):
            batch_weights = weights[:, rows].to(h.device)
            total = total + einsum(batch_weights, h.double(), "k b, b pos layer d -> k pos layer d")
    vectors, of_shuffled = total.float().cpu()
    return vectors, of_shuffled


def _positions(chat: ChatModel) -> tuple[str, ...]:
    return tuple(str(i) for i in range(-suffix_length(chat.tokenizer), 0))


def mean_difference(
    chat: ModelLike, prompts: PromptSet, *, batch_size: int = 32, seed: int = 0
) -> Candidates:
    """Compute the difference of means of resid_pre, harmful minus harmless (paper section 3.2).

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        prompts: Harmful and harmless prompts.
        batch_size: Prompts per forward pass.
        seed: Seed of the shuffled labels.

    Returns:
        One vector per post-instruction position and layer.

    Raises:
        SafeSteerError: Without prompts of both kinds, or where activations are not finite.

    Example:
        >>> from safesteer.directions.extraction import mean_difference
        >>> candidates = mean_difference(chat, ss.load_prompts().split("train").first(2))
        >>> candidates.vectors.shape == (len(candidates.positions), chat.n_layers, chat.d_model)
        True
    """
    chat = as_chat(chat)
    expect(PromptSet, prompts)
    arms = Arm(prompts.harmful), Arm(prompts.harmless)
    vectors, shuffled = _mean_contrast(chat, *arms, batch_size, seed)
    return Candidates(vectors, _positions(chat), "instruction", shuffled)


def prefill_contrast(
    chat: ModelLike,
    prompts: PromptSet,
    *,
    batch_size: int = 32,
    seed: int = 0,
    refusals: Sequence[str] = REFUSALS,
    compliances: Sequence[str] = COMPLIANCES,
) -> Candidates:
    """Compute the difference of means, refusing minus complying continuations of the same harmful prompts.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        prompts: The harmful ones are used.
        batch_size: Prompts per forward pass.
        seed: Seed of the shuffled labels.
        refusals: Continuations that refuse; prompt i is followed by number i modulo their number.
        compliances: Continuations that comply, likewise.

    Returns:
        One vector per layer, at the position "mean": the mean over the continuation.

    Raises:
        SafeSteerError: Without harmful prompts, or where activations are not finite.

    Example:
        >>> from safesteer.directions.extraction import prefill_contrast
        >>> prefill_contrast(chat, ss.load_prompts().split("train").first(2)).positions
        ('mean',)
    """
    expect(PromptSet, prompts)
    chat, texts = as_chat(chat), prompts.harmful
    arms = [Arm(texts, [c[i % len(c)] for i in range(len(texts))]) for c in (refusals, compliances)]
    vectors, shuffled = _mean_contrast(chat, *arms, batch_size, seed)
    return Candidates(vectors, ("mean",), "prefill", shuffled)


def system_contrast(
    chat: ModelLike,
    prompts: PromptSet,
    *,
    batch_size: int = 32,
    seed: int = 0,
    refusing: str = REFUSING_SYSTEM,
    complying: str = COMPLYING_SYSTEM,
) -> Candidates:
    """Compute the difference of means, a refusing minus a helpful system prompt before the same requests.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        prompts: The harmful ones are used.
        batch_size: Prompts per forward pass.
        seed: Seed of the shuffled labels.
        refusing: System prompt that makes the model refuse.
        complying: System prompt that makes it answer.

    Returns:
        One vector per post-instruction position and layer.

    Raises:
        SafeSteerError: Without harmful prompts, or where activations are not finite.
    """
    chat = as_chat(chat)
    arms = Arm(prompts.harmful, system=refusing), Arm(prompts.harmful, system=complying)
    vectors, shuffled = _mean_contrast(chat, *arms, batch_size, seed)
    return Candidates(vectors, _positions(chat), "system", shuffled)


def pca_difference(chat: ModelLike, prompts: PromptSet, *, batch_size: int = 32, seed: int = 0) -> Candidates:
    """Compute the first principal component of harmful minus harmless, pair by pair and not centred.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        prompts: Taken as pairs in their order. All activations are held at once (float64, on the CPU).
        batch_size: Prompts per forward pass.
        seed: Seed of the shuffled labels.

    Returns:
        One vector per post-instruction position and layer.

    Raises:
        SafeSteerError: Without prompts of both kinds, or where activations are not finite.
    """

    def axis(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.svd(a - b, full_matrices=False).Vh[0]

    return _axis_contrast(as_chat(chat), prompts, axis, "pca", batch_size, seed)


def logistic_probe(
    chat: ModelLike, prompts: PromptSet, *, batch_size: int = 32, seed: int = 0, C: float = 0.1
) -> Candidates:
    """Fit a logistic regression, harmful against harmless: its weights, in residual units.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        prompts: Harmful and harmless prompts. All activations are held at once (float64, on the CPU).
        batch_size: Prompts per forward pass.
        seed: Seed of the shuffled labels.
        C: Inverse regularization strength of scikit-learn, on standardized activations.

    Returns:
        One vector per post-instruction position and layer.

    Raises:
        SafeSteerError: Without prompts of both kinds, or where activations are not finite.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import
    from sklearn.preprocessing import StandardScaler

    def axis(a: Tensor, b: Tensor) -> Tensor:
        scaler = StandardScaler()
        x = scaler.fit_transform(torch.cat([a, b]).numpy())
        y = [1] * len(a) + [0] * len(b)
        probe = LogisticRegression(C=C, max_iter=1000).fit(x, y)
        return torch.from_numpy(probe.coef_[0] / scaler.scale_)

    return _axis_contrast(as_chat(chat), prompts, axis, "probe", batch_size, seed)


def _axis_contrast(
    chat: ChatModel, prompts: PromptSet, axis_of: AxisOf, name: str, batch_size: int, seed: int
) -> Candidates:
    """Compute one axis per position and layer, and the same with shuffled labels."""
    expect(PromptSet, prompts)
    if not prompts.harmful or not prompts.harmless:
        raise SafeSteerError("There are no prompts to read a direction from.")
    a, b = (_stacked(chat, Arm(texts), batch_size) for texts in (prompts.harmful, prompts.harmless))
    n = min(len(a), len(b))
    a, b = a[:n], b[:n]
    # Over both arms: a principal component does not see a swap inside a pair.
    order = torch.randperm(2 * n, generator=torch.Generator().manual_seed(seed))
    first, second = torch.cat([a, b])[order].split(n)
    shuffled = _scaled_axes(first, second, axis_of)
    return Candidates(_scaled_axes(a, b, axis_of), _positions(chat), name, shuffled)


def _stacked(chat: ChatModel, arm: Arm, batch_size: int) -> Float[Tensor, "n n_pos n_layers d_model"]:
    """Stack all activations of an arm, in the order of its texts, in float64 on the CPU."""
    stacked: Tensor | None = None
    for rows, h in read_activations(chat, arm, batch_size):
        if stacked is None:
            stacked = torch.zeros((len(arm.texts), *h.shape[1:]), dtype=torch.float64)
        stacked[rows] = h.double().cpu()
    assert stacked is not None
    return stacked


def _scaled_axes(
    a: Float[Tensor, "n n_pos n_layers d_model"],
    b: Float[Tensor, "n n_pos n_layers d_model"],
    axis_of: AxisOf,
) -> Float[Tensor, "n_pos n_layers d_model"]:
    """Compute axis_of(A, B) at every position and layer, as long as mean(A) - mean(B) is along it."""
    vectors = torch.zeros(a.shape[1:], dtype=torch.float64)
    for pos in range(a.shape[1]):
        for layer in range(a.shape[2]):
            a_here, b_here = a[:, pos, layer], b[:, pos, layer]
            axis = axis_of(a_here, b_here)
            axis = axis / axis.norm().clamp(min=1e-30)
            vectors[pos, layer] = axis * (axis @ (a_here.mean(0) - b_here.mean(0)))
    return vectors.float()


def from_vector(
    chat: ModelLike, vector: Float[Tensor, "*places d_model"] | Float[np.ndarray, "*places d_model"]
) -> Candidates:
    """Take a vector of your own as candidates. It has no labels to shuffle.

    Its length counts: the sweep adds it as it is. One of length 1 (a probe, a principal component, a row of a
    sparse autoencoder's decoder) hardly acts; give it the length of `mean_difference`'s at that layer.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        vector: One for all layers, [d_model], or one per layer, [n_layers, d_model], at the position "given";
            or one per position and layer, [n_pos, n_layers, d_model], at the last positions "-n_pos" to "-1".

    Raises:
        SafeSteerError: For a vector of another shape.

    Example:
        >>> import torch
        >>> from safesteer.directions.extraction import from_vector
        >>> from_vector(chat, torch.ones(chat.d_model)).direction(chat, "given", 1).layer
        1
    """
    chat, vector = as_chat(chat), torch.as_tensor(vector).detach().float().cpu()
    places = (chat.n_layers, chat.d_model)
    if not (vector.shape == places[1:] or vector.shape == places or vector.shape[1:] == places):
        raise SafeSteerError(
            f"A vector of shape {tuple(vector.shape)} does not fit '{chat.name}': give [{chat.d_model}],"
            f" [{chat.n_layers}, {chat.d_model}] for one per layer, or one dimension more in front for"
            " positions."
        )
    if vector.dim() == 3:
        return Candidates(vector.clone(), tuple(str(i) for i in range(-len(vector), 0)), "given")
    return Candidates(vector.expand(chat.n_layers, -1).clone()[None], ("given",), "given")
