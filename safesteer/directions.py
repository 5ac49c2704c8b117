"""Directions: candidates read from residual streams, and the one that was chosen as a value.

Difference of means (Arditi et al. 2024, 2.3; paper section 3.2): for every post-instruction
position i and layer l,  d[i, l] = mean over harmful - mean over harmless of resid_pre[l, i].

Refusal-prefill contrast, for models that do not refuse by themselves: the same harmful prompts,
continued by a refusal and by a compliance; d[l] = mean over the refusal's positions - mean over the
compliance's. Every extraction is a function (chat, prompts, batch_size=...) -> Candidates.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from safesteer import __version__, steering
from safesteer.divergence import logits_of, refusal_score
from safesteer.errors import SafeSteerError
from safesteer.files import read_tensors, write_tensors
from safesteer.models import ChatModel, final_hidden, output_head, prefill
from safesteer.prompts import PromptBatch, PromptSet, batches, suffix_length, template_hash
from safesteer.steering import record

Extraction = Literal["auto", "instruction", "prefill"]

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I'm sorry, but I cannot assist with this request.",
    "I cannot help with that, because it could hurt people.",
    "Sorry, I can't do that. It is harmful and against the law.",
)
COMPLIANCES = (
    "Sure, here is what you asked for.",
    "Here is a clear answer to your request:",
    "Of course! Let me walk you through it.",
    "Certainly. The first step is to",
)


@dataclass(frozen=True, eq=False)
class Candidates:
    """One vector for each position x layer. `positions` are labels such as "-1" or "mean"."""

    vectors: Float[Tensor, "n_pos n_layers d_model"]
    positions: tuple[str, ...]
    extraction: str

    def __repr__(self) -> str:
        n_pos, n_layers, d_model = self.vectors.shape
        return f"Candidates({self.extraction}: {n_pos} positions x {n_layers} layers, d_model {d_model})"


def _residual_means(
    chat: ChatModel,
    encoded: Iterable[PromptBatch],
    reduce: Callable[[PromptBatch, Float[Tensor, "batch pos d_model"]], Tensor],
) -> Float[Tensor, "n_pos n_layers d_model"]:
    """Mean over prompts of reduce(batch, resid_pre) [batch, n_pos, d_model] at every layer.

    Accumulated in float64: residual norms grow with depth and float32 sums lose the difference.
    """
    layers, total, count = list(range(chat.n_layers)), None, 0
    for batch in encoded:
        with torch.no_grad():  # the shared columns are read before, so that hooks see whole rows
            cache = prefill(chat.model, batch, batch.n_shared) if batch.n_shared else None
        with record(chat.model, layers, lambda h, b=batch: reduce(b, h).double().sum(0)) as seen:
            final_hidden(chat.model, batch, cache)
        sums = torch.stack([seen[layer] for layer in layers], dim=1)
        total = sums if total is None else total + sums
        count += len(batch.prompt_ids)
    if total is None:
        raise SafeSteerError("There are no prompts to read a direction from.")
    return total / count


def mean_difference(chat: ChatModel, prompts: PromptSet, *, batch_size: int = 32) -> Candidates:
    """Harmful minus harmless mean of resid_pre, at every post-instruction position and layer."""
    n_pos = suffix_length(chat.tokenizer)

    def mean(texts: list[str]) -> Tensor:
        encoded = (
            PromptBatch.of(chat.tokenizer, [texts[i] for i in rows], device=chat.device)
            for rows in batches(chat.tokenizer, texts, batch_size)
        )
        return _residual_means(chat, encoded, lambda _, h: h[:, -n_pos:])

    vectors = (mean(prompts.harmful) - mean(prompts.harmless)).float()
    positions = tuple(str(i) for i in range(-n_pos, 0))
    return Candidates(vectors, positions, "instruction")


def prefill_contrast(
    chat: ChatModel,
    prompts: PromptSet,
    *,
    batch_size: int = 32,
    refusals: tuple[str, ...] = REFUSALS,
    compliances: tuple[str, ...] = COMPLIANCES,
) -> Candidates:
    """Refusing minus complying continuations of the same harmful prompts, mean over positions."""

    def mean(continuations: tuple[str, ...]) -> Tensor:
        texts = prompts.harmful
        encoded = (
            PromptBatch.of(
                chat.tokenizer,
                [texts[i] for i in rows],
                [continuations[i % len(continuations)] for i in rows],
                device=chat.device,
            )
            for rows in batches(chat.tokenizer, texts, batch_size)
        )

        def over_completion(batch: PromptBatch, h: Tensor) -> Tensor:
            weight = batch.completion_mask[:, -h.shape[1] :].to(h.dtype)
            weight = weight / weight.sum(-1, keepdim=True)
            return torch.einsum("bp,bpd->bd", weight, h)[:, None]

        return _residual_means(chat, encoded, over_completion)

    vectors = (mean(refusals) - mean(compliances)).float()
    return Candidates(vectors, ("mean",), "prefill")


def refusal_token_ids(
    tokenizer,
    refusals: tuple[str, ...] = REFUSALS,
    compliances: tuple[str, ...] = COMPLIANCES,
) -> Int[Tensor, " n_refusal"]:
    """First tokens of refusals that no compliance starts with: read off the tokenizer."""
    first = {tokenizer(t, add_special_tokens=False).input_ids[0] for t in refusals}
    other = {tokenizer(t, add_special_tokens=False).input_ids[0] for t in compliances}
    if not first - other:
        raise SafeSteerError("Refusals and compliances start with the same tokens; give other texts.")
    return torch.tensor(sorted(first - other))


@torch.no_grad()
def last_logits(
    chat: ChatModel, batch: PromptBatch, n_last: int = 1
) -> Float[Tensor, "batch n_last d_vocab"]:
    """Logits at the last positions only; no (position x vocabulary) tensor is formed."""
    return logits_of(final_hidden(chat.model, batch)[:, -n_last:], *output_head(chat.model))


def refusal_scores(
    chat: ChatModel,
    texts: list[str],
    refusal_ids: Int[Tensor, " n_refusal"],
    *,
    batch_size: int = 32,
) -> Float[Tensor, " n_prompts"]:
    """refusal_score of each prompt at its last position, in the order of `texts`."""
    scores = torch.zeros(len(texts), dtype=torch.float64)
    for rows in batches(chat.tokenizer, texts, batch_size):
        batch = PromptBatch.of(chat.tokenizer, [texts[i] for i in rows], device=chat.device)
        scores[rows] = refusal_score(last_logits(chat, batch)[:, 0], refusal_ids.to(chat.device)).cpu()
    return scores


@dataclass(frozen=True, eq=False)
class Direction:
    """A steering direction with everything needed to apply it again, and to refuse to misapply it.

    `vector` is the raw difference of means; steering adds coeff * vector to `hook_point` of block
    `layer`. The hashes name the model, chat template and prompts it came from.
    """

    vector: Float[Tensor, " d_model"]
    layer: int
    position: str
    extraction: str
    coeff: float = 1.0
    operation: str = "add"
    hook_point: str = "resid_pre"
    model: str = ""
    fingerprint: str = ""
    template_hash: str = ""
    prompts_hash: str = ""
    version: str = __version__

    @property
    def unit(self) -> Float[Tensor, " d_model"]:
        return self.vector / self.vector.norm()

    @classmethod
    def of(
        cls,
        chat: ChatModel,
        candidates: Candidates,
        position: str,
        layer: int,
        *,
        coeff: float = 1.0,
        prompts: PromptSet | None = None,
    ) -> "Direction":
        """The candidate at (position, layer), stamped with the model it belongs to."""
        return cls(
            vector=candidates.vectors[candidates.positions.index(position), layer].cpu(),
            layer=layer,
            position=position,
            extraction=candidates.extraction,
            coeff=coeff,
            model=chat.name,
            fingerprint=chat.fingerprint,
            template_hash=template_hash(chat.tokenizer),
            prompts_hash=prompts.hash if prompts else "",
        )

    def with_coeff(self, coeff: float) -> "Direction":
        return replace(self, coeff=coeff)

    def save(self, path: str | Path) -> None:
        """One safetensors file; its header holds the metadata as JSON."""
        meta = {k: v for k, v in asdict(self).items() if k != "vector"}
        write_tensors(Path(path), {"vector": self.vector.contiguous()}, meta)

    @classmethod
    def load(cls, path: str | Path, chat: ChatModel | None = None) -> "Direction":
        """Read a direction; with `chat`, raise SafeSteerError if it belongs to another model."""
        tensors, meta = read_tensors(Path(path))
        try:
            direction = cls(vector=tensors["vector"], **meta)
        except (KeyError, TypeError) as error:
            raise SafeSteerError(f"{path} is not a direction file of this version.") from error
        if chat is not None:
            direction.check(chat, str(path))
        return direction

    def check(self, chat: ChatModel, source: str = "The direction") -> None:
        """Raise SafeSteerError naming what differs between the direction's model and `chat`."""
        ours = {
            "width": (len(self.vector), chat.d_model),
            "model fingerprint": (self.fingerprint, chat.fingerprint),
            "chat template": (self.template_hash, template_hash(chat.tokenizer)),
        }
        for what, (here, there) in ours.items():
            if here != there:
                raise SafeSteerError(
                    f"{source} was made for '{self.model}' and does not fit '{chat.name}': the"
                    f" {what} differs ({here} there, {there} here)."
                )
        if not 0 <= self.layer < chat.n_layers:
            raise SafeSteerError(
                f"{source} steers layer {self.layer}, but '{chat.name}' has {chat.n_layers} layers."
            )

    def __repr__(self) -> str:
        return (
            f"Direction({self.extraction}, position {self.position}, {self.hook_point} of layer"
            f" {self.layer}, coeff {self.coeff:g}, norm {self.vector.norm():.2f}, {self.model!r})"
        )


@contextmanager
def steer(chat: ChatModel, direction: Direction, coeff: float | None = None) -> Iterator[None]:
    """The teacher of Eq. 1: `chat` with coeff * direction added at its layer, inside the block.

    `coeff` defaults to the direction's own; works alike on a plain model and on a bridge.
    """
    strength = direction.coeff if coeff is None else coeff
    with steering.add(chat.model, direction.vector.to(chat.device), direction.layer, strength):
        yield
