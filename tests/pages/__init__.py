"""Tests of pages, frames and slots."""
