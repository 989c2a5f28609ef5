"""Ending training runs at chosen moments.

Read variants (what is trained), watch (who looks on, and kills), broken (rules that are broken, to be noticed), life
(one process), power_cut (what the disk forgets), case (kills in a row, what must hold after them), campaign (cases).
"""
