"""Generating volumes: plan, generate, write."""
