"""Figures, and the page that shows a run: one offline file."""
