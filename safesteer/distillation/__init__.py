"""Step 3, distill: teach a student the steered teacher's choices on the safety tokens alone (section 3.4).

`loop.distill` is the whole step as one call, `loop.training_steps` the same step by step. A step (`step`)
samples answers (`rollouts`), compares student and teacher on them (`loss`, `divergence`) and updates what
`state` says trains. A folder keeps `checkpoints`, so that a training continues. `seal` holds what S had while
another trainer trains something else.
"""
