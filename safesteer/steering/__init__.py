"""Apply a direction to a model, and take it off again.

A direction is a value with everything needed to apply it (`direction`: `Direction` and `steer`). What it does
to the residual stream is one of a few interventions (`interventions`: `add`, `clamp`, `gate`, `ablate`),
which act through hooks that are always removed (`hooks`), in a part of the text (`scopes`). A reader of
harmfulness (`reader`) may say in which rows they act (`gating`). Saved values name the model that they belong
to (`stamps`). All of it works alike on a plain Hugging Face model and on a TransformerBridge.

Read `interventions` first: the table at its top holds every formula.
"""
