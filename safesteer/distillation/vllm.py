"""Sample rollouts from an external server: vLLM, or another OpenAI-compatible one.

Pass `server_sampler(endpoint)` to `loop.training_steps(..., sampler=...)`. The server must hold the student's
weights: bring them to it between steps, or accept that rollouts lag behind. How far sampler and student are
apart on the sampled tokens is logged as `sampler_gap` in every record: rounding gives hundredths of a nat,
old weights more.
"""

from collections.abc import Sequence
from typing import Any

from safesteer._endpoint import Endpoint
from safesteer.distillation.rollouts import Sampled, Sampler
from safesteer.models.generation import seed_of


def server_sampler(endpoint: Endpoint) -> Sampler:
    """Make a sampler that asks `endpoint` for token ids with their log-probabilities.

    Args:
        endpoint: The server. Prompts go out as token ids.

    Returns:
        A sampler. When used it raises SafeSteerError for a server that does not return tokens as ids
        (vLLM: return_tokens_as_token_ids).
    """

    def sample(
        prompts: Sequence[Sequence[int]], n_samples: int, max_new_tokens: int, keys: Sequence[tuple]
    ) -> list[list[Sampled]]:
        bodies = [
            {
                "prompt": list(ids),
                "n": n_samples,
                "max_tokens": max_new_tokens,
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": -1,
                # A server fills what is left out from the checkpoint's generation_config.
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "min_tokens": 0,
                "logprobs": 0,
                "seed": seed_of(key) >> 32,  # servers take 31 bits
                "return_tokens_as_token_ids": True,
            }
            for ids, key in zip(prompts, keys, strict=True)
        ]
        answers = []
        for reply in endpoint.ask_all("completions", bodies):
            try:
                samples = [_read(choice["logprobs"]) for choice in reply["choices"]]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise endpoint.unlike() from error
            if len(samples) != n_samples or any(len(s.ids) > max_new_tokens for s in samples):
                raise endpoint.unlike()
            answers.append(samples)
        return answers

    return sample


def _read(logprobs: dict[str, Any]) -> Sampled:
    """Read one answer from the part of the reply that holds its tokens."""
    ids = (int(token.removeprefix("token_id:")) for token in logprobs["tokens"])
    return Sampled(tuple(ids), tuple(float(p) for p in logprobs["token_logprobs"]))
