"""Formats: each is a reversible pair between an `Artifact` (or its table) and what other tools read and write."""
