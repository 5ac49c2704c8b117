"""The page of `gpu.py`: one table per section."""

ABOUT = {
    "loss": "Loss and its gradient on |S| = 50, bfloat16; Liger compares the whole vocabulary."
    " Memory is above what goes in.",
    "step": "One optimizer step: float32 weights, blocks from the steered layer up, passes and teacher in"
    " bfloat16. Memory is above the loaded models.",
    "sweep": "The position x layer sweep, bfloat16; one by one: three passes of all prompts per candidate,"
    " for a few of them, and the range is that of single candidates.",
    "rollout": "Answers of equal length, sampled, weights in bfloat16.",
    "large": "Random weights in bfloat16. The roofline is the longer of two times: of the operations at the"
    " measured rate of a square product, and of the bytes (weights once per new token, keys and values) at"
    " that of a copy. Steps train an adapter of rank 16 with recomputed activations; memory is above the"
    " weights.",
    "checks": "The same weights, prompts and draws in float32 on the CPU and on the device; right: the"
    " difference is below 0.01 standard deviations of the CPU's values (0.1 after several steps). Answers"
    " differ from the first near-tie on.",
}


def page(result: dict) -> str:
    """Write the tables as Markdown."""
    machine, reached = result["machine"], result["reached"]
    lines = ["# Measured on a GPU" if machine["gpu"] else "# Measured without a GPU", ""]
    if result["tiny"]:
        lines += ["A trial of the script with tiny models: its numbers say nothing.", ""]
    where = machine["gpu"] or machine["processor"]
    lines += [
        f"`performance/gpu.py` on {where}, {machine['threads']} threads of {machine['processor']}, torch"
        f" {machine['torch']}. Reached: {reached['matmul_tflops']:.3g} TFLOP/s in a bfloat16 product,"
        f" {reached['gb_per_s']:.4g} GB/s in a copy. Times are medians of warm repeats, and their range.",
        "",
    ]
    for name, rows in result["sections"].items():
        lines += [f"## {name.capitalize()}", "", ABOUT[name], "", *table(rows), ""]
    return "\n".join(lines)


def table(rows: list[dict]) -> list[str]:
    """Write rows as a table with all their columns; the range of times goes into one."""
    cells = [_with_range(row) for row in rows]
    columns = list(dict.fromkeys(column for row in cells for column in row))
    head = ["| " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|" + "---|" * len(columns)]
    return head + ["| " + " | ".join(_cell(row.get(c)) for c in columns) + " |" for row in cells]


def _with_range(row: dict) -> dict:
    return {
        ("seconds" if k == "median_s" else k): (
            f"{v:.3g} ({row['min_s']:.3g} to {row['max_s']:.3g}, n={row['repeats']})"
            if k == "median_s" and "min_s" in row
            else v
        )
        for k, v in row.items()
        if k not in ("min_s", "max_s", "repeats")
    }


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")
