"""Judges: does an answer refuse, is it harmful? By its wording, by a classifier, by an endpoint."""
