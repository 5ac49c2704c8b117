"""What changed and what did not: refusals, drift, perplexity and capability, with intervals.

`scores.evaluate` measures base, teacher and student of a run; `suite.run_suite` any model on public
benchmarks, with `capability` (lm-evaluation-harness) and `humaneval` (generated code, confined).
"""
