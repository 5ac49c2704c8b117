"""Every setting of the method: what it means, its bounds, its unit and its default, on one page.

One class per stage of a run, in the order of the stages. The defaults are those of the preset "quick"
(`recipes.py`), found by measurement on SmolLM2-135M-Instruct; only precision (there that of the machine)
and the number of test pairs (there 50) differ. The paper's values are in the presets "paper-qwen" and
"paper-llama", those for a model that refuses in "two-sided". `safesteer settings` prints this page.
"""

from typing import Annotated, Literal

from safesteer._settings import (
    CountOrNone,
    PositiveOrNone,
    SizeOrNone,
    TextOrNone,
    Words,
    setting,
    setting_or_none,
    settings,
)

Extraction = Literal["auto", "instruction", "prefill", "system", "pca", "probe"]
Control = Literal["random", "shuffled"]
Split = Literal["train", "val", "distill"]
# Settings of a recipe that `load_model` takes beside the model's name, device and precision.
MODEL_SOURCE = ("revision", "trust_remote_code", "template", "template_args", "quantize", "device_map")
ALIKE = ("trust_remote_code", "quantize", "device_map")  # of them, those of base and student
# What the paper tells the teacher of its prompt arm (Table 3), quoted from the authors' scripts.
PROMPT_TEACHER = "You are a safety-conscious assistant. Never produce harmful, unsafe, or disallowed content"
Divergence = Literal["reverse", "forward", "symmetric", "jsd"]
Normalizer = Literal["partial", "generalized", "tail", "renormalized"]
Support = Literal["safety", "topk", "full"]


@settings("direction")
class DirectionConfig:
    """Stage 1: read candidate directions, score them, choose one and its strength (section 3.2)."""

    extraction: Extraction = setting(
        "auto",
        "How candidates are read: 'instruction' is the paper's difference of means, 'prefill' contrasts"
        " refusing with complying continuations, 'system' two system prompts, 'pca' and 'probe' are a"
        " principal component and a logistic regression. 'auto' takes 'instruction' where the model refuses"
        " by itself, and filters prompts only where enough pass; else 'prefill'.",
    )
    file: TextOrNone = setting_or_none(
        None, "File of a direction of your own (Direction.save), scored and taken in place of candidates."
    )
    native_share: float = setting(
        0.25,
        "Harmful val prompts that the model must refuse by itself for 'auto' to take 'instruction'.",
        unit="share",
        ge=0,
    )
    n_train: CountOrNone = setting_or_none(
        64, "Pairs of the train split, of all categories in turn, that candidates are read from; none: all."
    )
    n_val: CountOrNone = setting_or_none(
        8, "Pairs of the val split, of all categories in turn, that candidates are scored on; none: all."
    )
    n_val_first: CountOrNone = setting_or_none(
        8,
        "Successive halving: every candidate is scored on this many pairs, the best quarter on twice as many,"
        " and so on up to n_val. none: every candidate is scored on all of them, as published.",
    )
    coeff: PositiveOrNone = setting_or_none(
        None,
        "Coefficient of the direction, at which it is also scored. none: 1 for a direction ranked by"
        " ablation; for one ranked by steering, the smallest of 1.2, 1.4, 1.6 and 1.8 at which 95 % of the"
        " greedy answers refuse, else the one that refuses most.",
    )
    rank_by: Literal["auto", "ablation", "steering"] = setting(
        "auto",
        "Score that ranks the candidates: 'ablation' is the paper's, 'steering' suits models that do not"
        " refuse. 'auto': 'steering' for prefill contrasts and vectors of your own, else 'ablation'.",
    )
    max_layer_share: float = setting(
        0.8, "Layers from this share of the depth on cannot be selected.", unit="share", ge=0, le=1
    )
    max_kl: float = setting(
        0.1,
        "Largest KL(base || ablated) on harmless prompts, where ablation ranks.",
        unit="nats per token",
        infinite=True,
        ge=0,
    )
    min_steering: float = setting(
        0.0,
        "Smallest refusal score of harmless prompts when the candidate is added, where ablation ranks.",
        unit="nats",
        infinite=True,
    )
    n_kl_tokens: int = setting(3, "Tokens of the base's answers over which KL is measured.", ge=1)
    controls: Annotated[tuple[Control, ...], Words] = setting(
        ("random", "shuffled"),
        "Controls beside every score: a random direction that moves the model as far, and the same extraction"
        " with shuffled labels.",
    )
    n_controls: SizeOrNone = setting_or_none(2, "Best candidates that get controls; none: all of them.")
    n_held_out: int = setting(
        2, "Best candidates that are scored again on prompts that selection did not see."
    )
    n_compared: int = setting(
        3, "Candidates ranked by steering that are compared at several coefficients, by their answers.", ge=1
    )
    n_compare_prompts: int = setting(16, "Harmful prompts whose answers are compared for that.", ge=1)
    batch_size: CountOrNone = setting_or_none(
        None, "Prompts per pass that reads or scores candidates; none: 32, scored on a CPU 8.", unit="prompts"
    )
    tokens_per_pass: CountOrNone = setting_or_none(
        None,
        "Tokens up to which candidates are packed into one pass; none: 1536 on a CPU, 8192 on a GPU.",
        unit="tokens",
    )
    seed: int = setting(0, "Seed of controls, intervals and shuffled labels.")


@settings("tokens")
class TokenConfig:
    """Stage 2: select the safety tokens S (section 3.3)."""

    k: int = setting(50, "Size of S.", unit="tokens", ge=1)
    k_vote: int = setting(30, "Tokens that each position votes for: K' of the paper.", ge=1)
    horizon: int = setting(7, "Tokens sampled per answer: H of the paper.", ge=1)
    n_samples: int = setting(4, "Answers sampled per prompt: N of the paper.", ge=1)
    min_steered_prob: float = setting(
        1e-3, "Mean probability under the teacher that a token needs to be selected.", ge=0, le=1
    )
    method: Literal["vote", "mean"] = setting(
        "vote", "Rank by votes, or by the mean log-ratio (ablation of the paper)."
    )
    teacher: Literal["steered", "prompt"] = setting(
        "steered",
        "The teacher that is compared with the base: steered, or under the system prompt (Table 3).",
    )
    system: str = setting(
        PROMPT_TEACHER, "System prompt of the teacher 'prompt'; the default is the paper's."
    )
    rollouts: Literal["teacher", "base"] = setting(
        "teacher", "Who samples the answers: the teacher, or the base (ablation of the paper)."
    )
    early_ends: bool = setting(
        True, "Answers may end before their last token; false: they may not, as in the authors' scripts."
    )
    prompts: Literal["harmless", "harmful"] = setting(
        "harmless", "Prompts of the val split that are answered."
    )
    seed: int = setting(0, "Seed of the sampled answers.")
    batch_size: int = setting(32, "Prompts sampled per batch; each needs n_samples caches.", ge=1)
    n_contexts: int = setting(3, "Example contexts kept per token.")


@settings("distill")
class DistillConfig:
    """Stage 3: teach the student on S (section 3.4). One word per choice of the paper's Tables 3 to 5."""

    divergence: Divergence = setting(
        "symmetric", "Divergence between student and teacher; 'reverse' is the paper's."
    )
    normalizer: Normalizer = setting(
        "generalized",
        "How mass outside S counts: 'partial' leaves it out (Eq. 6; its minimum is q / e), 'generalized' adds"
        " - p + q, 'tail' adds one bucket for it, 'renormalized' divides by the mass on S (Table 5).",
    )
    support: Support = setting(
        "safety", "Tokens compared: S, the teacher's top tokens ('topk') or the whole vocabulary (Table 4)."
    )
    teacher: Literal["steered", "prompt"] = setting(
        "steered", "The steered base, or the base under the system prompt (Table 3)."
    )
    system: str = setting(
        PROMPT_TEACHER, "System prompt of the teacher 'prompt'; the default is the paper's."
    )
    harmless_teacher: Literal["base", "ablated"] = setting(
        "base",
        "Teacher of harmless answers: the base as it is, or the base with the direction ablated, which"
        " refuses less than the base does (a two-sided teacher).",
    )
    splits: Annotated[tuple[Split, ...], Words] = setting(
        ("distill", "train", "val"),
        "Splits of the prompts that are distilled on; the paper's is 'distill' alone.",
    )
    train_layers: Literal["all", "blocks", "from_steered"] = setting(
        "from_steered",
        "What trains: all weights, all blocks but not the vocabulary's rows, or the blocks from the steered"
        " layer up.",
    )
    n_steps: int = setting(75, "Optimizer steps.", ge=1)
    harmful_per_step: int = setting(10, "Harmful prompts per step.", ge=1)
    harmless_per_step: int = setting(
        18, "Harmless prompts per step, on which the student is held to the base; 0: no anchor, as published."
    )
    n_rollouts: int = setting(1, "Answers per prompt and step.", ge=1)
    max_new_tokens: int = setting(8, "Length of the answers.", unit="tokens", ge=1)
    rollouts: Literal["student", "mixed"] = setting(
        "mixed", "Who answers: the student (on-policy), or the teacher every second prompt ('mixed')."
    )
    wrapped_share: float = setting(
        0.0,
        "Share of the prompts that the student reads in a wrapper (families of 'val'); the teacher of harmful"
        " ones reads them plain.",
        ge=0,
        le=1,
    )
    opened_share: float = setting(
        0.0,
        "Share of the answers that are opened for the student by a compliant text, which the teacher of"
        " harmful ones does not see.",
        ge=0,
        le=1,
    )
    max_opening: int = setting(
        16, "Length of the longest opening (used if opened_share > 0).", unit="tokens", ge=1
    )
    anchor_support: Literal["same", "full"] = setting(
        "full", "Tokens compared on harmless answers: as `support`, or the whole vocabulary."
    )
    anchor_weight: float = setting(
        1.0, "Weight of one harmless answer relative to one harmful answer.", ge=0, le=1e30
    )
    late_anchor_weight: float = setting(4.0, "anchor_weight in the last third of the steps.", ge=0, le=1e30)
    margin_weight: float = setting(
        0.0,
        "Weight of a margin beside the divergence: at each position the gap between the best logit of S and"
        " the best other one is to have the teacher's sign, as greedy decoding decides by it; 0: none.",
        ge=0,
        le=1e30,
    )
    texts_per_step: int = setting(
        0,
        "Texts of the base per step on which the student is held to it over the whole vocabulary, so that"
        " long answers and plain text stay as they were; 0: none.",
        ge=0,
    )
    text_tokens: int = setting(64, "Length of those texts.", unit="tokens", ge=1)
    text_weight: float = setting(1.0, "Weight of their mean divergence.", ge=0, le=1e30)
    decay: float = setting(
        0.8,
        "Weight of each position of an answer relative to the one before; 1: all alike, as published.",
        gt=0,
        le=1,
    )
    beta: float = setting(0.5, "Mixture of the Jensen-Shannon divergence ('jsd').", gt=0, lt=1)
    n_topk: int = setting(50, "Tokens of the support 'topk'.", ge=1)
    lora_rank: int = setting(
        0, "Rank of a low-rank adapter, with one copy of the weights; 0: full fine-tuning."
    )
    lora_alpha: int = setting(
        32, "As in peft: the adapter's output is multiplied by lora_alpha / lora_rank.", ge=1
    )
    keep_adapter: bool = setting(False, "With align: write the adapter beside the merged model too.")
    precision: Literal["auto", "float32", "bfloat16"] = setting(
        "float32",
        "Precision of forward passes; the weights that train stay in float32. 'auto' is bfloat16 where the"
        " processor has instructions for it, else float32.",
    )
    sharded: bool = setting(False, "Spread the blocks over the processes of torchrun or accelerate launch.")
    checkpointing: bool = setting(
        False, "Recompute activations in the backward pass: less memory, more time."
    )
    lr: float = setting(3e-4, "Peak learning rate of AdamW.", gt=0, le=1e30)
    warmup: float = setting(
        0.1, "Share of the steps in which the rate rises, from 0 at the first.", unit="share", ge=0, le=1
    )
    weight_decay: float = setting(0.0, "Weight decay of AdamW.", ge=0, le=1e30)
    max_grad_norm: float = setting(1.0, "Norm at which gradients are clipped.", gt=0, le=1e30)
    micro_batch: int = setting(
        16,
        "Answers per forward pass: fewer need less memory and more time; the loss is the same.",
        unit="answers",
        ge=1,
    )
    checkpoint_every: int = setting(20, "Steps between checkpoints.", ge=1)
    watch_every: int = setting(
        5,
        "Steps between looks at the refusals of a few harmful val prompts, which a loss can take away; 0:"
        " never.",
        ge=0,
    )
    n_watched: int = setting(16, "Prompts that are answered when refusals are watched.", ge=1)
    on_fall: Literal["stop", "warn"] = setting(
        "stop",
        "What happens where the student refuses fewer of them than the base: training stops, or warns.",
    )
    check_every: int = setting(
        0, "Steps between looks at val for early stopping, which leaves val out of training; 0: never."
    )
    stop_refusal: float = setting(
        0.95,
        "Early stopping needs at least this share of harmful val prompts refused (used if check_every > 0).",
        unit="share",
        ge=0,
        le=1,
    )
    stop_kl: float = setting(
        0.1,
        "Early stopping needs a KL to the base on harmless val prompts of at most this (used if check_every"
        " > 0).",
        unit="nats per token",
        ge=0,
    )
    seed: int = setting(0, "Seed of prompts, answers and adapter.")


@settings("export")
class ExportConfig:
    """Stage 4: write the trained model."""

    dtype: Literal["base", "float32", "bfloat16", "float16"] = setting(
        "base", "Precision of the exported weights: 'base' is that of the base's files."
    )


@settings("evaluate")
class EvaluateConfig:
    """Stage 5: measure base, teacher and student on the test split."""

    n_prompts: CountOrNone = setting_or_none(
        None, "Pairs of the test split, of all categories in turn; none: all."
    )
    sets: Annotated[tuple[str, ...], Words] = setting(
        ("own-short", "own-questions", "own-hazard-words"),
        "Other sets of prompts that base and student answer: the project's own in other forms, or public ones"
        " by name (harmbench, xstest, everyday ...).",
    )
    data: TextOrNone = setting_or_none(
        None,
        "Folder of local benchmark rows, or 'hub': the public sets of the suite 'small' are answered too, as"
        " far as they are there.",
    )
    n_set_prompts: CountOrNone = setting_or_none(50, "Prompts of each of those sets; none: all.")
    max_new_tokens: int = setting(128, "Length of the greedy answers.", unit="tokens", ge=1)
    n_kl_tokens: int = setting(16, "Tokens of the base's answers over which drift is measured.", ge=1)
    perplexity_tokens: int = setting(4096, "Plain text that is read.", unit="tokens", ge=2)
    perplexity_width: int = setting(512, "Window in which it is read.", unit="tokens", ge=2)
    batch_size: int = setting(50, "Prompts per batch.", ge=1)


@settings("explain")
class ExplainConfig:
    """Stage 6: say why these tokens. Prompts, samples and texts are what costs time."""

    n_prompts: int = setting(16, "Prompts that stability and stories are read from.", ge=1)
    n_harmful: int = setting(8, "Harmful prompts for coverage.", ge=1)
    n_samples: int = setting(4, "Answers sampled per prompt.", ge=1)
    n_traces: int = setting(6, "Answers shown token by token.")
    max_tokens: int = setting(32, "Tokens read per answer.", unit="tokens", ge=1)
    n_sets: int = setting(8, "Random and matched sets beside S.", ge=1)
    n_splits: int = setting(8, "Random halvings of prompts and of samples.", ge=1)
    seed: int = setting(0, "Seed of sets and halvings; samples have that of the tokens.")
