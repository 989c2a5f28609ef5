"""Commits on disk: what a manifest says, where it lies, and how its pages are read. Nothing here imports torch.

In reading order: header.py (everything but the pages), records.py (the pages), format.py (the file), disk.py (durable
metadata), lock.py, folder.py (where commits live), reader.py (the data).
"""
