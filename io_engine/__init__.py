"""Byte-level I/O: files, offsets and aligned buffers over four backends."""
