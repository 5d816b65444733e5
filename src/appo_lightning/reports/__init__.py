"""Readable reports of a run."""
