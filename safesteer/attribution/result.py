"""What an explanation holds, as one value: it prints, renders, gives a table, and has one JSON file."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd

from safesteer._errors import SafeSteerError
from safesteer._files import read_value, write_json
from safesteer._token_text import visible
from safesteer.attribution.coverage import Coverage
from safesteer.attribution.stability import Stability
from safesteer.attribution.stories import TokenStory
from safesteer.attribution.tracing import Trace
from safesteer.attribution.word_groups import GROUPS


@dataclass(frozen=True, repr=False)
class Attribution:
    """Which tokens, why, how much they cover, how stable they are. One JSON file."""

    traces: tuple[Trace, ...]
    stories: dict[int, TokenStory]
    coverage: Coverage
    stability: Stability

    def with_groups(self, groups: Mapping[str | int, str]) -> "Attribution":
        """Return a copy in which some tokens have a group of your choice.

        Args:
            groups: Token text (with or without its leading space) or id -> group.

        Raises:
            SafeSteerError: For a group that does not exist, or a token that is not in S.
        """
        for token, group in groups.items():
            if group not in GROUPS:
                raise SafeSteerError(f"'{group}' (for token {token!r}) is not one of {list(GROUPS)}.")
        known = {key for s in self.stories.values() for key in (s.id, s.text, s.text.strip())}
        if unknown := [token for token in groups if token not in known]:
            raise SafeSteerError(f"{unknown[0]!r} is no token of S: give its text, or its id as a number.")
        stories = dict(self.stories)
        for story in self.stories.values():
            for key in (story.id, story.text, story.text.strip()):
                if key in groups:
                    stories[story.id] = replace(story, group=groups[key], group_reason="your choice")
                    break
        return replace(self, stories=stories)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per token of S: group, votes, lift and logit parts (nats), probabilities, ranks."""
        columns = ["id", "text", "group", "votes", "lift", "direct", "later_layers", "change"]
        columns += ["p_base", "p_steered", "rank_base", "rank_steered"]
        rows = [{c: getattr(story, c) for c in columns} for story in self.stories.values()]
        return pd.DataFrame(rows, columns=columns)

    def __repr__(self) -> str:
        parts = "; ".join(
            f"S carries {text.at_k('S'):.0%} of KL on {text.name} (matched sets"
            f" {text.at_k('matched in base probability'):.0%})"
            for text in self.coverage.texts
        )
        return f"Attribution({len(self.traces)} traces, {len(self.stories)} tokens: {parts})"

    def _repr_html_(self) -> str:
        """Render short tables: tokens by group, coverage and stability at the size of S."""
        k, stable = self.coverage.k, self.stability
        shares = [
            {"text": text.name} | {curve.name: f"{text.at_k(curve.name):.1%}" for curve in text.curves}
            for text in self.coverage.texts
        ]
        at = max((i for i, size in enumerate(stable.ks) if size <= k), default=0)
        overlaps = [
            {
                "compared": curve.name,
                "Jaccard": f"{curve.jaccard.mean[at]:.2f}",
                "lowest to highest": f"{curve.jaccard.low[at]:.2f} to {curve.jaccard.high[at]:.2f}",
            }
            for curve in stable.curves
        ]
        overlaps.append(
            {"compared": "chance", "Jaccard": f"{stable.chance[at]:.2f}", "lowest to highest": ""}
        )
        tables = {
            f"{len(self.stories)} safety tokens by group": self._groups(),
            f"Share of KL(teacher || base) on S and on other sets of {k} tokens": pd.DataFrame(shares),
            f"Overlap of two selections of {stable.ks[at]} tokens": pd.DataFrame(overlaps),
        }
        return "".join(
            f"<p><b>{title}</b></p>{table.to_html(escape=True, index=False)}"
            for title, table in tables.items()
        )

    def _groups(self) -> pd.DataFrame:
        """Return one row per group: tokens, votes, mean lift, the first few texts."""
        frame, rows = self.to_frame(), []
        for group in (g for g in GROUPS if (frame.group == g).any()):
            members = frame[frame.group == group]
            texts = [visible(text).replace("␣", " ").strip() for text in members.text[:8]]
            rows.append(
                {
                    "group": group,
                    "tokens": len(members),
                    "votes": int(members.votes.sum()),
                    "mean lift, nats": f"{members.lift.astype(float).mean():+.2f}",
                    "first tokens": ", ".join(texts),
                }
            )
        return pd.DataFrame(rows)

    def save(self, path: str | Path) -> None:
        """Write one JSON file."""
        write_json(Path(path), asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> "Attribution":
        """Read what `save` wrote; raises SafeSteerError for anything else."""
        return read_value(cls, path, "an attribution file")
