"""Bytes that crossed the borders of each tier."""

from __future__ import annotations

import angelptm_native as native

from angelptm.device import Device
from angelptm.engine.commits import Commits
from angelptm.engine.updates import Updates


class Traffic:
    """A move from one tier to another counts as read on the first and written on the second.

    What the updater computes in place on the host is no move; the parameters that it publishes are written to the tier
    they are published in.
    """

    def __init__(
        self,
        store: native.Store,
        device: Device,
        updates: Updates,
        fetcher: native.Fetcher,
        commits: Commits | None,
    ) -> None:
        self._store = store
        self._commits = commits
        self._device = device
        self._updates = updates
        self._fetcher = fetcher

    def bytes(self) -> dict[str, dict[str, int]]:
        mover = self._store.mover
        update = self._updates.utilisation()
        fetched = self._fetcher.totals
        to_device = int(fetched["copied_bytes"])
        ssd_read = mover.read_bytes + int(update["read_bytes"]) + int(fetched["read_bytes"])
        ssd_written = mover.written_bytes + int(update["written_bytes"])
        if self._commits is not None:
            ssd_written += self._commits.written_bytes
        return {
            "device": {"read": self._device.read_bytes, "written": to_device},
            "host": {
                "read": to_device + ssd_written,
                "written": ssd_read + self._device.read_bytes + int(update["published_bytes"]),
            },
            "ssd": {"read": ssd_read, "written": ssd_written},
        }
