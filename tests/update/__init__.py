"""Tests of the native updater."""
