"""Does memory grow with steps, and time with more than the number of sequences? In one run.

    python performance/steps.py [--steps 200]

1. `steps` small steps (2 answers of 4 tokens): peak resident memory after the first tenth and at the end.
2. One step each of 8, 16 and 32 answers of 16 tokens, after a warm-up: seconds per sequence.
"""

import argparse
import json
import time

from measure import extra_mb, machine, start_memory
from trainer import set_up

import safesteer as ss
from safesteer.distillation.loop import training_steps
from safesteer.distillation.state import prepare_student


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    teacher, prompts = set_up()
    settings = {"harmless_per_step": 0, "rollouts": "student"}
    config = ss.DistillConfig(n_steps=options.steps, harmful_per_step=2, max_new_tokens=4, **settings)
    state = prepare_student(ss.load_model("smollm2-135m"), teacher.direction, config)
    before, early = start_memory(), 0.0
    for record in training_steps(state, teacher, prompts):
        if record.step == options.steps // 10:
            early = before + extra_mb(before)
    late = before + extra_mb(before)
    result = {"peak_mb_early": round(early), "peak_mb_end": round(late), "ratio": round(late / early, 3)}

    seconds = {}
    for n in (8, 8, 16, 32):  # the first is the warm-up
        state.config = ss.DistillConfig(
            n_steps=state.step + 1, harmful_per_step=n, max_new_tokens=16, warmup=0, **settings
        )
        started = time.perf_counter()
        for _ in training_steps(state, teacher, prompts):
            pass
        seconds[n] = time.perf_counter() - started
    result |= {f"seconds_a_sequence_{n}": round(s / n, 3) for n, s in seconds.items()}
    print(json.dumps({**result, "steps": options.steps, **machine()}))


if __name__ == "__main__":
    main()
