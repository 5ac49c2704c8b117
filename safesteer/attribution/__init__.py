"""The view: which tokens were selected and why, as values, figures and one offline page."""

from safesteer.attribution.explain import Attribution, ExplainConfig, explain
from safesteer.attribution.report import write_report
from safesteer.attribution.trace import Trace, trace

__all__ = ["Attribution", "ExplainConfig", "Trace", "explain", "trace", "write_report"]
