"""Rollouts from a server that samples faster than we do: vLLM, or another OpenAI-compatible one.

Pass `server_sampler(endpoint)` to `distill(..., sampler=...)`. The server must hold the student's weights:
bring them to it between steps (`distill` is a generator), or accept that rollouts lag behind. How far
sampler and student are apart on the sampled tokens is logged as `sampler_gap` in every record: rounding
gives hundredths of a nat, old weights more.
"""

from collections.abc import Sequence

from safesteer._endpoint import Endpoint
from safesteer.distillation.rollouts import Sampled, Sampler
from safesteer.models.generation import seed_of


def server_sampler(endpoint: Endpoint) -> Sampler:
    """A sampler that asks `endpoint` for token ids with their log-probabilities.

    Prompts go out as token ids. Raises SafeSteerError, when used, for a server that does not return
    tokens as ids (vLLM: return_tokens_as_token_ids).
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
                "logprobs": 0,
                "seed": seed_of(key) >> 32,  # servers take 31 bits
                "return_tokens_as_token_ids": True,
            }
            for ids, key in zip(prompts, keys, strict=True)
        ]
        found = []
        for reply in endpoint.ask_all("completions", bodies):
            try:
                logprobs = [choice["logprobs"] for choice in reply["choices"]]
                found.append(
                    [
                        Sampled(
                            tuple(int(token.removeprefix("token_id:")) for token in one["tokens"]),
                            tuple(float(p) for p in one["token_logprobs"]),
                        )
                        for one in logprobs
                    ]
                )
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise endpoint.unlike() from error
            if len(found[-1]) != n_samples or any(len(s.ids) > max_new_tokens for s in found[-1]):
                raise endpoint.unlike()
        return found

    return sample
