"""Judging data: sources before they are packed, packed datasets afterwards."""
