"""What happened in a training step, and when: recorded, kept in a file, shown in Perfetto and in a report.

``Recorder`` is in angelptm.timeline.recorder; what only reads timelines does without the native module.
"""

from angelptm.timeline.data import Counter, Event, Lane, Step, Timeline
from angelptm.timeline.file import FILE_NAME, load, save

__all__ = ["FILE_NAME", "Counter", "Event", "Lane", "Step", "Timeline", "load", "save"]
