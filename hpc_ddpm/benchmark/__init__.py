"""Measuring: contestants in turns, spreads, where it was measured, JSON and Markdown."""
