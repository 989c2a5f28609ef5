"""Kernels: parity of instruction sets, torch as reference, the summation tree."""
