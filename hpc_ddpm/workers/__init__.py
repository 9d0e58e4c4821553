"""Processes share work through a folder, without messages: it records who is at work and who has which unit."""
