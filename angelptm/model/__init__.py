"""Models to build from a configuration."""
