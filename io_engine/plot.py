"""The measurements of one bench as a picture."""

from __future__ import annotations

import errno
from typing import Any

from io_engine.errors import IoError
from io_engine.sizes import format_bytes


def require_matplotlib() -> None:
    """Raises IoError when there is no matplotlib: to be called before minutes of measuring."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise IoError("setup", "", 0, 0, errno.ENOSYS, "--plot needs matplotlib: pip install matplotlib") from error


def plot_bench(report: dict[str, Any], path: str) -> None:
    """One column for each operation; throughput above (median, min to max), latency below (median, up to p99)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = report["results"] + report["ceiling"]
    ops = list(dict.fromkeys(row["op"] for row in rows))
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    shapes = sorted({(row["block_bytes"], row["queue_depth"]) for row in rows})
    by_key = {(row["op"], row["backend"], row["block_bytes"], row["queue_depth"]): row for row in rows}
    width = 0.8 / len(backends)
    panel_width = max(4.0, 0.35 * len(shapes) * len(backends) + 1.5)
    figure, axes = pyplot.subplots(
        2, len(ops), figsize=(panel_width * len(ops), 7.5), sharex=True, sharey="row", squeeze=False
    )
    for column, op in enumerate(ops):
        rate, latency = axes[0][column], axes[1][column]
        for index, backend in enumerate(backends):
            found = [by_key[(op, backend, block, depth)] for block, depth in shapes]
            places = [place + (index - (len(backends) - 1) / 2) * width for place in range(len(shapes))]
            medians = [row["bytes_per_s"] / 1e9 for row in found]
            below = [(row["bytes_per_s"] - row["bytes_per_s_min"]) / 1e9 for row in found]
            above = [(row["bytes_per_s_max"] - row["bytes_per_s"]) / 1e9 for row in found]
            colour = "0.55" if backend == "fio" else f"C{index}"
            label = "fio (ceiling)" if backend == "fio" else backend
            rate.bar(places, medians, width, yerr=[below, above], color=colour, label=label, capsize=2)
            middle = [row["latency_p50_s"] * 1e3 for row in found]
            tail = [(row["latency_p99_s"] - row["latency_p50_s"]) * 1e3 for row in found]
            latency.bar(places, middle, width, yerr=[[0.0] * len(tail), tail], color=colour, capsize=2)
        rate.set_title(op)
        latency.set_xticks(
            range(len(shapes)), [f"{format_bytes(block)}\nx {depth}" for block, depth in shapes], fontsize=9
        )
        latency.set_xlabel("block size x queue depth")
        for axis in (rate, latency):
            axis.grid(axis="y", alpha=0.3)
            axis.set_axisbelow(True)
    axes[0][0].set_ylabel("GB/s (median, min to max)")
    axes[1][0].set_ylabel("latency in ms (median, up to p99)")
    machine = report["machine"]
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(backends), frameon=False)
    access = "O_DIRECT" if report["direct"] else "buffered"
    figure.suptitle(
        f"{machine['cpu']}, {machine['device']}, {machine['file_system']}, {access}, {report['rounds']} rounds",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise IoError("write", path, 0, 0, error.errno or errno.EIO) from error
    finally:
        pyplot.close(figure)
