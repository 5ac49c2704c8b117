"""SafeSteer: localized on-policy distillation for safety, interpretability first.

See the safety direction, see which output tokens it moves and why, teach the model on those tokens alone,
and take home a plain Hugging Face checkpoint:

    import safesteer as ss

    chat = ss.load_model("smollm2-135m")
    direction = ss.find_direction(chat)
    tokens = ss.select_tokens(chat, direction)
    student = ss.distill(chat, direction, tokens)
    ss.export(student, "my-model")

The names are listed in `__init__.pyi` and imported when they are first used, so that `import safesteer` and
the command line's --help load no torch. Everything else is in the subpackages: `safesteer.directions`,
`safesteer.tokens`, `safesteer.attribution`, `safesteer.distillation`, `safesteer.evaluation` ...
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
