"""What a model's steps will take before any has run.

In reading order: ``step`` goes through a step on shapes alone; ``machine`` measures this machine; ``outlook`` says what
the step takes there, or on a machine that a file describes; ``search`` looks for settings and for the largest model.
"""
