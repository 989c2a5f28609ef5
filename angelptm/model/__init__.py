"""Models: presets, building without values, and where values come from. Import the parts by name."""
