"""Which kind of word a safety token is: simple rules that can be read, and overruled.

In this order, the first that applies:
1. the user's own choice (`Attribution.with_groups`);
2. "format": the token holds no letter and no digit (punctuation, white space, markdown, bytes);
3. a word list: "starts a refusal", "names the harm", "hedges". English only; a word matches a list
   by a stem at its start ("harm" matches "harmful");
4. its neighbours: the group that most of its listed nearest unembedding neighbours have, if their
   cosine is 0.4 or more (this is what finds spelling variants and other languages); neighbours
   of one or two letters are left out, they are near to every short word;
5. its cluster: tokens of S are clustered by where they are voted for and by what they are (the mean
   hidden state of a token's voting positions beside its unembedding row, each centred and scaled to
   length 1; average linkage by cosine). A token without a group takes the one that most named tokens
   of its cluster have, if at least two agree;
6. "other".
The lists were written from what refusals say, not fitted to any model: a group is a reading aid,
and nothing is computed from it.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float
from sklearn.cluster import AgglomerativeClustering
from torch import Tensor
from torch.nn.functional import normalize

GROUPS = ("starts a refusal", "names the harm", "hedges", "format", "other")
NO_RULE = "no rule applies"
MIN_COSINE = 0.4
MIN_LETTERS = 3
MIN_ALIKE = 0.3  # mean cosine at which two clusters still join

# Stems; a trailing "." asks for the whole word.
STEMS = {
    "starts a refusal": (
        "sorry apolog unfortunat cannot. can't. cant. couldn won't. unable refus declin i. i'm. 'm."
        " as. don't. not. never. no. regret afraid. forgive unwilling impossible prohibit"
    ),
    "names the harm": (
        "illegal unlaw law. laws. legal harm danger unethic ethic immoral unsafe safety violen violat"
        " abus crim kill weapon explosi bomb attack drug poison suicid hate hatred discrimin exploit"
        " fraud scam theft steal hack malicious malware threat risk injur hurt victim terror inappropri"
        " offensive against. consequence damag privacy punish"
    ),
    "hedges": (
        "however but. may. might could. would. should. perhaps possibl generally typically often."
        " sometimes likely any. confus misunderst instead recommend suggest advis consult important"
        " understand clarif appreciate concern sensitiv caution careful responsib professional depend"
        " provide assist help support although though. while. please"
    ),
}

WORD_GROUPS = tuple(STEMS)


def by_word(text: str) -> tuple[str, str] | None:
    """Return (group, reason) of rule 2 or 3, or None where neither applies."""
    word = text.strip().lower().replace("\u2019", "'")
    if not any(c.isalnum() for c in word) or (word.startswith("⟨") and word.endswith("⟩")):
        return "format", "no letter or digit"
    for group, stems in STEMS.items():
        for stem in stems.split():
            if word == stem[:-1] if stem.endswith(".") else word.startswith(stem):
                return group, f"word list: {stem.rstrip('.')}"
    return None


def group_of(text: str, neighbours: Sequence[tuple[str, float]]) -> tuple[str, str]:
    """Return (group, reason) by rules 2 to 4.

    Args:
        text: The token's text.
        neighbours: (text, cosine) of the nearest unembedding rows.
    """
    by_list = by_word(text)
    if by_list is not None:
        return by_list
    near = [(by_word(t), t.strip(), cosine) for t, cosine in neighbours if cosine >= MIN_COSINE]
    named = [
        (rule[0], word, cosine)
        for rule, word, cosine in near
        if rule is not None and rule[0] != "format" and len(word) >= MIN_LETTERS
    ]
    if named:
        group = Counter(g for g, _, _ in named).most_common(1)[0][0]
        _, word, cosine = next(n for n in named if n[0] == group)
        return group, f"like its neighbour '{word}' (cosine {cosine:.2f})"
    return "other", NO_RULE


def by_cluster(
    named: Sequence[tuple[str, str]],
    contexts: Float[Tensor, "n_set d_model"],
    rows: Float[Tensor, "n_set d_model"],
) -> list[tuple[str, str]]:
    """Apply rule 5 to the tokens that no rule has named yet.

    Args:
        named: (group, reason) of each token by rules 2 to 4.
        contexts: Mean hidden state of each token's voting positions, centred; zero without a vote.
        rows: Unembedding row of each token, centred.
    """
    if len(named) < 2:
        return list(named)
    both = torch.cat([normalize(contexts.float(), dim=-1), normalize(rows.float(), dim=-1)], -1)
    # A token that nothing voted for has no context: it is compared by its row alone.
    model = AgglomerativeClustering(metric="cosine", linkage="average", distance_threshold=1 - MIN_ALIKE)
    model.set_params(n_clusters=None)  # the distance decides how many
    clusters = model.fit_predict(both.cpu().numpy()).tolist()
    groups = []
    for (group, reason), cluster in zip(named, clusters, strict=True):
        peers = Counter(
            g for (g, _), c in zip(named, clusters, strict=True) if c == cluster and g in WORD_GROUPS
        )
        if reason == NO_RULE and peers and peers.most_common(1)[0][1] > 1:
            group, n = peers.most_common(1)[0]
            reason = f"same context cluster as {n} tokens of this group"
        groups.append((group, reason))
    return groups
