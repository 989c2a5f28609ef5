"""Optimizer states: in which formats parameters have them, and where each lies on the pages of a span."""
