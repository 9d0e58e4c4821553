"""Processes that share a folder without talking to each other: who is at work, and who has what."""
