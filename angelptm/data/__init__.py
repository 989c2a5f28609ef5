"""Tokens to train on: text corpora, token files of other projects, and batches in a resumable order.

Reading order: corpus (which files), tokenize (text to token files), tokens (reading them), nanogpt and megatron (files
that others wrote), batches (the order), dataset (all of it from the ``data`` section).
"""

from angelptm.data.batches import TokenBatches
from angelptm.data.dataset import open_dataset
from angelptm.data.tokenize import open_tokenizer
from angelptm.data.tokens import max_token

__all__ = ["TokenBatches", "max_token", "open_dataset", "open_tokenizer"]
