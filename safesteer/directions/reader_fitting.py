"""Fit a reader of harmfulness: at which layer, and above which score a prompt counts as harmful.

A logistic regression on standardized residuals of harmful and harmless prompts, as in Arditi et al. 2024, but
pooled over the prompt or at the last token of the instruction, where harmfulness is written (arXiv
2507.11878), and not after it, where refusing is. Residuals are read once for all layers. The layer is chosen,
and the threshold set, by scores of prompts that the fit behind them has not seen; a harmful prompt and its
matched twin are always left out together.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Int

from safesteer._errors import SafeSteerError, expect
from safesteer.directions.activations import check_finite
from safesteer.models.chat_model import ChatModel, ModelLike, as_chat
from safesteer.models.templates import n_after_instruction
from safesteer.prompts.prompt_set import Prompt, PromptSet
from safesteer.steering.reader import HarmfulnessReader, Pooling, pooled_resid_pre
from safesteer.steering.stamps import stamp_of

C = 0.01  # inverse strength of scikit-learn's regularization, on standardized residuals
DEPTH = 0.8  # of the blocks: later layers are about the next token


def fit_reader(
    chat: ModelLike,
    prompts: PromptSet,
    *,
    layer: int | None = None,
    pooling: Pooling = "prompt",
    false_alarms: float = 0.1,
    misses: float = 0.02,
    n_folds: int = 5,
    seed: int = 0,
) -> HarmfulnessReader:
    """Fit a logistic regression, harmful against harmless, on one layer's residual stream.

    Args:
        chat: A ChatModel, a TransformerBridge, or (model, tokenizer).
        prompts: Harmful and harmless prompts; the more kinds, the better it reads prompts of other people.
        layer: The block whose input is read (None: of the layers below 0.8 of the depth the one with the
            best cross-validated AUC).
        pooling: "prompt": the mean over all tokens of the prompt; "instruction": its last token before those
            that the template writes after it.
        false_alarms: Share of the harmless prompts, in cross-validation, that may lie above the threshold.
        misses: Share of the harmful prompts, in cross-validation, that may lie below `clear_below`.
        n_folds: Parts of the cross-validation.
        seed: Deals the prompts to the parts.

    Returns:
        The fit on all prompts, with its threshold and what cross-validation says of it.

    Raises:
        SafeSteerError: For a setting out of bounds, too few prompts, or activations that are not finite.

    Example:
        >>> reader = ss.fit_reader(chat, ss.load_prompts().split("val").first(6), layer=1)
        >>> reader.layer, reader.pooling, len(reader.curve)
        (1, 'prompt', 1)
    """
    from sklearn.metrics import roc_auc_score  # slow to import

    chat = as_chat(chat)
    layers = _layers(chat, layer)
    _check(prompts, pooling, (false_alarms, misses), n_folds)
    harmful = np.array([p.label == "harmful" for p in prompts.prompts])
    fold, n_after = _folds(prompts, n_folds, seed), n_after_instruction(chat.tokenizer)
    resid_pre = _pooled(chat, prompts.prompts, pooling, n_after)
    left_out = {at: _left_out_scores(resid_pre[:, at], harmful, fold) for at in layers}
    aucs = {at: float(roc_auc_score(harmful, scores)) for at, scores in left_out.items()}
    best = max(layers, key=lambda at: aucs[at])
    scores, n_harmless = left_out[best], int((~harmful).sum())
    n_above, n_below = (
        math.floor(s * n + 1e-9) for s, n in ((false_alarms, n_harmless), (misses, harmful.sum()))
    )
    threshold = float(np.sort(scores[~harmful])[n_harmless - 1 - n_above])
    clear_below = min(threshold, float(np.sort(scores[harmful])[n_below]))
    weight, bias = _fit(resid_pre[:, best], harmful)
    return HarmfulnessReader(
        weight=torch.from_numpy(weight),
        bias=bias,
        layer=int(best),
        pooling=pooling,
        threshold=threshold,
        clear_below=clear_below,
        n_after=n_after,
        auc=aucs[best],
        false_alarms=float((scores[~harmful] > threshold).mean()),
        hits=float((scores[harmful] > threshold).mean()),
        misses=float((scores[harmful] < clear_below).mean()),
        layer_aucs=tuple(aucs.items()),
        **stamp_of(chat),
        prompts_hash=prompts.hash,
    )


def _layers(chat: ChatModel, layer: int | None) -> list[int]:
    if layer is None:
        return [at for at in range(chat.n_layers) if at < DEPTH * chat.n_layers]
    if not 0 <= layer < chat.n_layers:
        raise SafeSteerError(f"'{chat.name}' has the layers 0 to {chat.n_layers - 1}, and no layer {layer}.")
    return [layer]


def _check(prompts: PromptSet, pooling: str, shares: tuple[float, float], n_folds: int) -> None:
    expect(PromptSet, prompts)
    if pooling not in ("prompt", "instruction"):
        raise SafeSteerError(f"pooling must be prompt or instruction, not '{pooling}'.")
    for name, share in zip(("false_alarms", "misses"), shares, strict=True):
        if not 0 <= share < 1:
            raise SafeSteerError(f"{name} is a share from 0 to less than 1, not {share}.")
    smaller = min(len(prompts.harmful), len(prompts.harmless))
    if not 2 <= n_folds <= smaller:
        raise SafeSteerError(
            f"Cross-validation in {n_folds} parts needs at least 2 parts and as many prompts of each kind as"
            f" parts, and '{prompts.name}' has {smaller} of the rarer kind."
        )


def _folds(prompts: PromptSet, n_folds: int, seed: int) -> Int[np.ndarray, " n"]:
    """Deal the prompts to parts: a pair stays together, and every part has its share of both kinds."""
    from sklearn.model_selection import StratifiedGroupKFold  # slow to import

    groups = [p.pair or f"prompt {i}" for i, p in enumerate(prompts.prompts)]
    if len(set(groups)) < n_folds:
        raise SafeSteerError(
            f"'{prompts.name}' has {len(set(groups))} pairs, too few for {n_folds} parts of a"
            " cross-validation: use more prompts or a smaller n_folds."
        )
    labels = [p.label for p in prompts.prompts]
    fold = np.zeros(len(labels), dtype=np.int64)
    splitter = StratifiedGroupKFold(n_folds, shuffle=True, random_state=seed)
    for i, (_, left_out) in enumerate(splitter.split(labels, labels, groups)):
        fold[left_out] = i
    return fold


def _pooled(
    chat: ChatModel, prompts: tuple[Prompt, ...], pooling: Pooling, n_after: int
) -> Float[np.ndarray, "n n_layers d_model"]:
    """Read every prompt at every layer, in one pass each."""
    texts, layers = [p.text for p in prompts], range(chat.n_layers)
    pooled = np.zeros((len(texts), chat.n_layers, chat.d_model))
    for rows, batch in chat.batched(texts, 32):
        read = pooled_resid_pre(chat.model, batch, layers, pooling, n_after)
        check_finite(chat, read[:, None], [texts[i] for i in rows])
        pooled[rows] = read.numpy()
    return pooled


def _fit(
    x: Float[np.ndarray, "n d_model"], harmful: np.ndarray
) -> tuple[Float[np.ndarray, " d_model"], float]:
    """Fit on standardized residuals; return weight and bias for residuals as they are."""
    from sklearn.linear_model import LogisticRegression  # slow to import
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    scaler = StandardScaler().fit(x)
    with threadpool_limits(1):  # small products: a second thread spins more than it helps
        fit = LogisticRegression(C=C, max_iter=1000).fit(scaler.transform(x), harmful)
    weight = (fit.coef_[0] / scaler.scale_).astype(np.float32)
    # With the rounded weight: residuals have means that are large beside what they vary.
    return weight, float(fit.intercept_[0] - scaler.mean_ @ weight.astype(np.float64))


def _left_out_scores(
    x: Float[np.ndarray, "n d_model"], harmful: np.ndarray, fold: Int[np.ndarray, " n"]
) -> Float[np.ndarray, " n"]:
    """Score every prompt by a fit on the parts that do not hold it."""
    scores = np.zeros(len(x))
    for i in np.unique(fold):
        weight, bias = _fit(x[fold != i], harmful[fold != i])
        scores[fold == i] = x[fold == i] @ weight.astype(np.float64) + bias
    return scores
