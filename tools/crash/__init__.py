"""Ending training runs at chosen moments.

Read variants (what is trained), watch (who looks on, and kills), broken (stores that lose data, to be caught), life (one
process), power_cut (what the disk forgets), case (kills in a row and what must hold after them), campaign (which cases).
"""
