"""The engine against an unpaged reference: exactness, interruptions, access to values, materialized models, faults."""
