"""The two commands, small: what they print and write, how they fail, what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import io_engine
from io_engine import AlignedBuffer
from io_engine.bench import OPS, BenchPlan
from io_engine.fio import fio_path
from io_engine.sizes import format_bytes, parse_bytes
from io_engine.tune import best_settings

ROOT = Path(__file__).parents[2]


def io_command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "io_engine", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(io_command(*arguments), capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)


def test_quick_bench_reports_every_combination_and_the_ceiling(disk_folder: Path) -> None:
    picture = disk_folder.parent / "bench.png"
    finished = run("bench", "--quick", "--path", disk_folder, "--json", "--plot", picture)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    found = {(row["backend"], row["op"]) for row in report["results"]}
    working = [backend for backend, refusal in io_engine.working_backends().items() if not refusal]
    assert {"threads", "aiofiles"} <= set(working)
    assert found == {(backend, op) for backend in working for op in OPS}
    assert len(report["ceiling"]) == (len(OPS) if fio_path() else 0)
    for row in [*report["results"], *report["ceiling"]]:
        assert row["block_bytes"] == 1 << 20
        assert row["queue_depth"] == 8
        assert 0 < row["bytes_per_s_min"] <= row["bytes_per_s"] <= row["bytes_per_s_max"]
        assert 0 < row["latency_p50_s"] <= row["latency_p99_s"]
    assert {"cpu", "kernel", "file_system", "device"} <= report["machine"].keys()
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    assert os.listdir(disk_folder) == ["probe"]


def test_bench_takes_the_names_of_ds_io(disk_folder: Path) -> None:
    finished = run(
        *("bench", "--folder", disk_folder, "--io_size", "1M", "--block_size", "256K", "--queue_depth", 2),
        *("--loops", 1, "--read", "--no-fio", "--backend", "uring", "--json"),
    )
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert [(r["op"], r["block_bytes"], r["queue_depth"]) for r in report["results"]] == [("read", 256 << 10, 2)]
    assert report["file_bytes"] == 1 << 20
    assert report["ceiling"] == []


def test_quick_tune_writes_a_hardware_file(disk_folder: Path) -> None:
    output = disk_folder / "hardware.yaml"
    finished = run("tune", "--quick", "--path", disk_folder, "--output", output)
    assert finished.returncode == 0, finished.stderr
    content = yaml.safe_load(output.read_text())
    assert content.keys() == {"ssd", "io", "machine", "date"}
    (disk,) = content["ssd"]
    assert disk["path"] == str(disk_folder)
    assert all(disk[f"{op}_bytes_per_s"] > 0 for op in OPS)
    assert disk["capacity"] > 0
    assert 0 < disk["latency_seconds"] < 1
    assert content["io"]["backend"] in ("uring", "threads")
    assert content["io"]["queue_depth"] in (2, 4)
    assert content["io"]["block_bytes"] == 1 << 20
    assert sorted(os.listdir(disk_folder)) == ["hardware.yaml", "probe"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("bench", "--path", "/nonexistent/folder"), "/nonexistent/folder"),
        (("bench", "--size", "100TiB"), "bytes free"),
        (("bench", "--size", "many"), "not a size"),
        (("bench", "--size", "1MiB", "--block-size", "768KiB"), "divides"),
        (("bench", "--backend", "libaio"), "libaio"),
        (("bench", "--op", "erase"), "erase"),
        (("tune", "--quick", "--output", "/nonexistent/hardware.yaml", "--rounds", 1), "/nonexistent"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(arguments: tuple[object, ...], said: str, disk_folder: Path) -> None:
    where = () if "--path" in arguments else ("--path", disk_folder)
    finished = run(*arguments, *where)
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    # Without the progress, and what this machine does not run.
    lines = [line for line in finished.stderr.splitlines() if not line.startswith(("[", "left out: "))]
    assert len(lines) == 1
    assert said in lines[0]
    assert os.listdir(disk_folder) == ["probe"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_interrupted_bench_leaves_no_file(disk_folder: Path, number: int, code: int) -> None:
    command = io_command(
        "bench", "--path", disk_folder, "--size", "64MiB", "--rounds", 500, "--backend", "uring", "--no-fio"
    )
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        assert "writing the test file" in process.stderr.readline()
        time.sleep(1.0)  # somewhere in the first rounds
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(30) == code
    assert "Traceback" not in rest
    assert os.listdir(disk_folder) == ["probe"]


def test_tune_prefers_the_cheapest_settings_that_are_as_good() -> None:
    def rows(backend: str, depth: int, block: int, read: float, write: float) -> list[dict[str, object]]:
        return [
            {"backend": backend, "queue_depth": depth, "block_bytes": block, "op": op, "bytes_per_s": rate}
            for op, rate in (("read", read), ("write", write))
        ]

    results = [*rows("uring", 32, 4, 2.0, 1.0), *rows("uring", 8, 4, 1.99, 0.99), *rows("threads", 4, 4, 1.5, 1.0)]
    assert best_settings(results) == {"backend": "uring", "queue_depth": 8, "block_bytes": 4}


def test_sizes_are_read_as_fio_and_people_write_them() -> None:
    read = {"4MiB": 4 << 20, "4M": 4 << 20, "4m": 4 << 20, "4194304": 4 << 20, "4MB": 4_000_000, "1.5GiB": 3 << 29}
    assert {text: parse_bytes(text) for text in read} == read
    for bad in ("", "MiB", "4XB", "-1", "4 i"):
        with pytest.raises(ValueError, match="not a size"):
            parse_bytes(bad)
    assert [format_bytes(n) for n in (4 << 20, 1 << 30, 512, 3 << 10)] == ["4 MiB", "1 GiB", "512 B", "3 KiB"]


def test_plan_refuses_blocks_that_do_not_fill_the_file() -> None:
    with pytest.raises(ValueError, match="divides"):
        BenchPlan(".", 1 << 20, [3 << 19], [8], ["uring"], OPS, 5)


def test_buffer_is_page_aligned_and_will_not_close_under_a_view() -> None:
    buffer = AlignedBuffer(10000)
    assert len(buffer) == 10000
    assert buffer.address % 4096 == 0
    view = buffer.view(4096, 100)
    with pytest.raises(BufferError):
        buffer.close()
    view.release()
    buffer.close()
    with pytest.raises(ZeroDivisionError), AlignedBuffer(10) as buffer:  # not replaced by the view's BufferError
        [view := buffer.view(0, 1), 1 // 0]
    with pytest.raises(ValueError, match="1 byte"):
        AlignedBuffer(0)
