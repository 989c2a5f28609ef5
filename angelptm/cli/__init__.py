"""The ``angelptm`` command."""
