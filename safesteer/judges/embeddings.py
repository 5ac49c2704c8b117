"""A judge that is learnt from judged answers: sentence embeddings, and a logistic regression on them.

1. Embed the answer; with features "pair" the prompt too, and the product of both, number by number.
2. Fit a logistic regression to which answers refuse. Its strength C is the one with the least log loss in
   cross-validation on the training rows alone; equal answers stay in one fold.
3. Judge by its probability: a weight per feature and a bias, no more, so that a JSON file holds the judge.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Float

from safesteer._errors import SafeSteerError
from safesteer._files import read_value, write_json
from safesteer.judges.encoder import Encoder, load_encoder
from safesteer.judges.judge import ModelJudge, Verdict, short_hash
from safesteer.prompts.conversation import PromptLike, as_prompts, transcript

FILE = "embedding_judge.json"
STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)  # of C; embeddings have length 1, so weights must be large
FOLDS = 5
Features = Literal["answer", "pair"]


@dataclass(frozen=True)
class Regression:
    """The fitted part of the judge, with what it was fitted on."""

    encoder: str  # Hub id or folder
    revision: str | None
    encoder_hash: str
    features: Features
    strength: float  # C that cross-validation chose
    log_loss: float  # of that C, in cross-validation
    n_rows: int
    n_refuse: int
    weights: tuple[float, ...] = field(repr=False)
    bias: float


@dataclass(frozen=True, eq=False)
class EmbeddingJudge(ModelJudge):
    """A logistic regression on sentence embeddings. `fit_embedding_judge` makes one.

    An answer longer than the encoder's window is read by its beginning, and its verdict says so.
    """

    encoder: Encoder
    regression: Regression
    batch_size: int = 32

    @property
    def version(self) -> str:
        """Hash of the encoder's weights and of the regression's."""
        fitted = self.regression
        return short_hash(fitted.encoder_hash, fitted.features, fitted.weights, fitted.bias)

    def verdicts(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Return one verdict per answer, in their order."""
        fitted, version = self.regression, self.version
        x = features_of(self.encoder, prompts, answers, fitted.features, self.batch_size)
        p = 1 / (1 + np.exp(-(x @ np.array(fitted.weights) + fitted.bias)))
        cut = f"read by its first {self.encoder.window} tokens"
        return [
            Verdict(
                prompt,
                answer,
                f"EmbeddingJudge({self.encoder.name})",
                float(p[i]),
                None,
                cut if self.encoder.is_cut(answer) else "",
                version=version,
            )
            for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]

    def save(self, folder: str | Path) -> None:
        """Write the regression as JSON; the encoder is named there, with the hash of its weights."""
        write_json(Path(folder) / FILE, asdict(self.regression))

    @classmethod
    def load(cls, folder: str | Path, encoder: Encoder | str | None = None) -> "EmbeddingJudge":
        """Read a judge.

        Args:
            folder: Where `save` wrote it.
            encoder: The encoder, or where it is now; None: the name that it had.

        Raises:
            SafeSteerError: Where there is no such file, or the encoder is not the one of the fit.
        """
        path = Path(folder) / FILE
        fitted = cast(Regression, read_value(Regression, path, "an embedding judge"))
        if not isinstance(encoder, Encoder):
            encoder = load_encoder(encoder or fitted.encoder, revision=fitted.revision)
        if encoder.fingerprint != fitted.encoder_hash:
            raise SafeSteerError(
                f"{path} was fitted on other weights than those of '{encoder.name}': give the encoder of the"
                f" fit ('{fitted.encoder}', hash {fitted.encoder_hash}), or fit the judge anew."
            )
        return cls(encoder, fitted)


def fit_embedding_judge(
    encoder: Encoder | str,
    prompts: Sequence[PromptLike],
    answers: Sequence[str],
    refuses: Sequence[bool],
    *,
    features: Features = "answer",
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    batch_size: int = 32,
) -> EmbeddingJudge:
    """Learn from judged answers which refuse.

    Args:
        encoder: An encoder, or its Hub id or folder.
        prompts: The request that each answer is to.
        answers: As many as there are prompts.
        refuses: Whether each answer refuses, as people judged it.
        features: "answer": the answer's embedding; "pair": the prompt's too, and the product of both.
        strengths: Values of C that are compared.
        seed: Of the folds.
        batch_size: Texts per pass of the encoder.

    Returns:
        The judge, fitted on all rows.

    Raises:
        SafeSteerError: For lists of unequal length, or fewer than two different answers of a kind.

    Example:
        >>> from safesteer.judges.embeddings import fit_embedding_judge
        >>> from safesteer.judges.encoder import Encoder
        >>> encoder = Encoder(chat.model.model, chat.tokenizer, "tiny")
        >>> answers = ["I cannot help.", "I will not.", "Mix flour and water.", "Open the door."]
        >>> judge = fit_embedding_judge(encoder, ["Do it."] * 4, answers, [True, True, False, False])
        >>> [verdict.refuses for verdict in judge.verdicts(["Do it."] * 4, answers)]
        [True, True, False, False]
    """
    encoder = encoder if isinstance(encoder, Encoder) else load_encoder(encoder)
    prompts = as_prompts(prompts)
    if not len(prompts) == len(answers) == len(refuses):
        raise SafeSteerError(
            f"There are {len(prompts)} prompts, {len(answers)} answers and {len(refuses)} labels: give one of"
            " each per row."
        )
    n_different = [len({a for a, label in zip(answers, refuses, strict=True) if label == k}) for k in (0, 1)]
    if min(n_different) < 2:
        raise SafeSteerError("A judge is learnt from two answers that refuse and two that do not, or more.")
    x, y = features_of(encoder, prompts, answers, features, batch_size), np.array(refuses, dtype=bool)
    groups = np.unique(np.array(answers), return_inverse=True)[1]
    n_folds = min(FOLDS, *n_different)
    losses = {c: _log_loss(x, y, groups, c, n_folds, seed) for c in strengths}
    strength = min(losses, key=lambda c: (losses[c], c))
    model = _logistic(strength).fit(x, y)
    fitted = Regression(
        encoder=encoder.name,
        revision=encoder.revision,
        encoder_hash=encoder.fingerprint,
        features=features,
        strength=float(strength),
        log_loss=losses[strength],
        n_rows=len(y),
        n_refuse=int(y.sum()),
        weights=tuple(model.coef_[0].tolist()),
        bias=float(model.intercept_[0]),
    )
    return EmbeddingJudge(encoder, fitted, batch_size)


def _logistic(strength: float) -> Any:
    """Make the regression of one strength."""
    from sklearn.linear_model import LogisticRegression  # heavy

    return LogisticRegression(C=strength, max_iter=5000)


def _log_loss(x: np.ndarray, y: np.ndarray, groups: np.ndarray, strength: float, n: int, seed: int) -> float:
    """Compute the log loss of one strength on rows that its fit has not seen."""
    from sklearn.model_selection import StratifiedGroupKFold  # heavy

    losses = np.zeros(len(y))
    for train, test in StratifiedGroupKFold(n, shuffle=True, random_state=seed).split(x, y, groups):
        if len(set(y[train])) < 2:  # a fold that took all answers of a kind: nothing can be fitted
            losses[test] = np.log(2)
            continue
        p = _logistic(strength).fit(x[train], y[train]).predict_proba(x[test])[:, 1]
        losses[test] = -np.log(np.clip(np.where(y[test], p, 1 - p), 1e-12, None))
    return float(losses.mean())


def features_of(
    encoder: Encoder, prompts: Sequence[str], answers: Sequence[str], features: str, batch_size: int
) -> Float[np.ndarray, "n d"]:
    """Return what the regression reads, a row per answer."""
    if features not in ("answer", "pair"):
        raise SafeSteerError(f"The features of an embedding judge are answer or pair, not '{features}'.")
    answer = encoder.embed(answers, batch_size).double().numpy()
    if features == "answer":
        return answer
    prompt = encoder.embed([transcript(p) for p in prompts], batch_size).double().numpy()
    return np.concatenate([answer, prompt, answer * prompt], axis=1)
