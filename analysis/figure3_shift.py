"""Figure 3: how far the student's representations of general prompts move from the base's.

The paper finds that distilling on S moves them least. The shift is the distance of mean final hidden
states at the last prompt position, in units of the base's spread, over harmless val prompts. Refuted if
the whole-vocabulary student moves no further than SafeSteer's, at equal refusals (the rows that were
made, columns `shift` of the other studies, are not at equal ones). The teacher is the base, steered.
"""

import pandas as pd
from ablation import Trained, read_command_line, run

import safesteer as ss
from safesteer._files import write_text
from safesteer.directions.shifts import representation_shift
from safesteer.report.figures import shift_figure

ARMS = {"safesteer": {}, "whole vocabulary": {"distill.support": "full"}}


def main() -> None:
    study = read_command_line("figure3_shift", __doc__)
    prompts = ss.load_prompts().split("val").first(study.limit).harmless
    drawn: list[pd.DataFrame] = []

    def shifts(arm: Trained) -> dict[str, float]:
        teacher = arm.base.copy()
        with ss.steer(teacher, arm.direction):
            models = {"base": arm.base, "teacher": teacher, "student": arm.student}
            points = representation_shift(models, prompts)
        drawn.append(points)
        return {f"shift_{name}": float(rows["shift"].iloc[0]) for name, rows in points.groupby("model")}

    print(run(study, ARMS, shifts).to_string())
    if drawn:
        page = shift_figure(drawn[0]).to_html(include_plotlyjs=True)
        write_text(study.folder.with_suffix(".html"), page)


if __name__ == "__main__":
    main()
