"""AngelPTM."""
