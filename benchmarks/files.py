# SPDX-License-Identifier: Apache-2.0
"""What the file path alone costs: scan, decode, apply, encode, verify, commit; without any network.

python benchmarks/files.py --output benchmarks/results/files.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydicom import Dataset, dcmread, uid
from pydicom.data import get_testdata_file
from pydicom.pixels import pixel_array
from setting import machine, versions

from monai_salm.io import worker
from monai_salm.release.catalog import scan
from monai_salm.release.commit import write_atomically
from monai_salm.release.labels import Cohort
from monai_salm.release.manifest import ManifestRow
from monai_salm.release.protect import protect_cohort

CODECS: dict[str, tuple[str, dict[str, str]]] = {
    "native": (uid.ExplicitVRLittleEndian, {}),
    "rle": (uid.RLELossless, {"encoding_plugin": "pylibjpeg"}),
    "jpeg_ls": (uid.JPEGLSLossless, {"encoding_plugin": "pyjpegls"}),
    "jpeg_2000": (uid.JPEG2000Lossless, {"encoding_plugin": "pylibjpeg"}),
}
"""Transfer syntax, and how pydicom writes it."""
BUDGET = "5 HU"
STEPS = 5
WINDOW = (-1100.0, 1100.0)
"""All voxels may move."""
RATIO = 0.1
"""Part of the voxels that move."""


class Bank(dict[str, Any]):
    """Random signs of the full budget in a tenth of the voxels, made when they are asked for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape

    def __getitem__(self, sample_id: str) -> NDArray[np.int8]:
        return signs(self._shape)


def signs(shape: tuple[int, ...]) -> NDArray[np.int8]:
    """(1, *spatial) steps."""
    rng = np.random.default_rng(0)
    delta = np.zeros(int(np.prod(shape)), np.int8)
    moved = rng.integers(0, delta.size, int(RATIO * delta.size))
    delta[moved] = STEPS * (2 * rng.integers(0, 2, moved.size, dtype=np.int8) - 1)
    return delta.reshape(1, *shape)


def write_copy(
    cohort: Cohort, shape: tuple[int, ...], out: Path, shard: str | None = None, bank: Mapping[str, Any] | None = None
) -> list[ManifestRow]:
    """Write images of one shape, as slices or as volumes."""
    options = {"budget": BUDGET, "window": WINDOW, "output_dir": out, "spatial_dims": len(shape), "shard": shard}
    return protect_cohort(cohort, bank or Bank(shape), **options)


def slices(count: int, size: int) -> Iterator[NDArray[np.int16]]:
    """Stored values of a CT series: a body of soft tissue in air, with the noise of a CT (8 HU)."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    noise = rng.normal(0, 8, (size, size))
    for index in range(count):
        body = rows**2 / 0.6 + columns**2 / 0.8 < 0.9 + 0.1 * np.sin(index / 50)
        tissue = 1064 + 40 * np.sin(6 * rows + index / 20) * np.cos(5 * columns)
        yield np.rint(np.where(body, tissue, 24) + np.roll(noise, index * 7919)).clip(0, 2047).astype(np.int16)


def write_series(folder: Path, count: int, size: int, codec: str = "native", name: str = "series") -> int:
    """One CT series; its size in bytes."""
    folder.mkdir(parents=True)
    template = dcmread(get_testdata_file("CT_small.dcm", download=False))
    for keyword in ("PixelPaddingValue", "SmallestImagePixelValue", "LargestImagePixelValue", "DataSetTrailingPadding"):
        template.pop(keyword, None)
    template.Rows = template.Columns = size
    template.SeriesInstanceUID = uid.generate_uid(entropy_srcs=[name])
    for index, plane in enumerate(slices(count, size)):
        template.PixelData = plane.tobytes()
        template["PixelData"].VR = "OW"
        template.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        template.SOPInstanceUID = uid.generate_uid(entropy_srcs=[name, str(index)])
        template.file_meta.MediaStorageSOPInstanceUID = template.SOPInstanceUID
        template.ImagePositionPatient = [0, 0, 2.5 * index]
        _encode(template, codec)
        template.save_as(folder / f"{index:05d}")
    return sum(path.stat().st_size for path in folder.iterdir())


def _encode(dataset: Dataset, codec: str) -> None:
    syntax, options = CODECS[codec]
    if codec != "native":
        dataset.compress(syntax, generate_instance_uid=False, **options)


def bare(export: Path, out: Path, codec: str, delta: NDArray[np.int8]) -> None:
    """What a script would do: read, decode, add, encode, save."""
    out.mkdir()
    for index, path in enumerate(sorted(export.iterdir())):
        dataset = dcmread(path)
        plane = pixel_array(dataset, raw=True) + delta[index]
        dataset.PixelData = plane.astype(np.int16).tobytes()
        dataset["PixelData"].VR = "OW"
        dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        _encode(dataset, codec)
        dataset.save_as(out / path.name)


@contextmanager
def timed(into: dict[str, float], name: str) -> Iterator[None]:
    """Adds the seconds of a block, by the clock and of the processor (of this process and its reading child)."""
    wall, cpu = time.perf_counter(), _processor_seconds()
    yield
    into[f"{name}_wall_s"] = round(time.perf_counter() - wall, 3)
    into[f"{name}_cpu_s"] = round(_processor_seconds() - cpu, 3)


def _processor_seconds() -> float:
    return time.process_time() + worker.call(time.process_time)


def protect(export: Path, out: Path, dims: int, shape: tuple[int, ...], into: dict[str, float]) -> int:
    """Scan an export and write its protected copy, as ``monai-salm protect`` does; the number of files written."""
    with timed(into, "headers"):
        scan(export, dims, check_pixels=False)
    with timed(into, "scan"):
        catalog = scan(export, dims, window=WINDOW)
    cohort = Cohort(catalog.cases, ("a",), catalog.refusals, catalog.root)
    bank = {case.sample_id: signs(shape) for case in cohort.cases}  # to make it is no part of the file path
    with timed(into, "protect"):
        rows = write_copy(cohort, shape, out, bank=bank)
    return sum(row.levels > 0 for row in rows)


def codecs(count: int, size: int, repetitions: int) -> dict[str, Any]:
    """Each codec: our path beside the bare one, taking turns; the fastest of the repetitions counts."""
    found = {}
    for codec in CODECS:
        with TemporaryDirectory() as name:
            folder = Path(name)
            total = write_series(folder / "in", count, size, codec)
            plane = signs((size, size, count))[0].transpose(2, 1, 0)
            runs = []
            for turn in range(repetitions):
                run: dict[str, float] = {}
                worker.stop()  # it keeps what it has decoded
                worker.call(time.process_time)
                with timed(run, "bare"):
                    bare(folder / "in", folder / f"bare{turn}", codec, plane)
                assert protect(folder / "in", folder / f"out{turn}", 3, (size, size, count), run) == count
                runs.append(run)
            best = {key: min(run[key] for run in runs) for key in runs[0]}
            ours = {kind: best[f"scan_{kind}"] + best[f"protect_{kind}"] for kind in ("wall_s", "cpu_s")}
            found[codec] = best | {
                "slices": count,
                "file_mb": round(total / count / 1e6, 3),
                "slices_per_s": round(count / ours["wall_s"], 1),
                "slices_per_core_s": round(count / ours["cpu_s"], 1),
                "pixel_mb_per_s": round(count * size * size * 2e-6 / ours["wall_s"], 1),
                "ratio_wall": round(ours["wall_s"] / best["bare_wall_s"], 2),
                "ratio_cpu": round(ours["cpu_s"] / best["bare_cpu_s"], 2),
                "ratio_cpu_without_scan": round(best["protect_cpu_s"] / best["bare_cpu_s"], 2),
            }
            print(codec, json.dumps(found[codec]), flush=True)
    return found


class Memory:
    """Samples the memory of this process and its reading child, together."""

    def __init__(self) -> None:
        self.start = self.peak = self._now()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _now(self) -> int:
        pids = ["self", *Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
        return sum(_resident(pid) for pid in pids)

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.peak = max(self.peak, self._now())

    def stop(self) -> int:
        """Bytes at the peak, above the start."""
        self._over.set()
        self._thread.join()
        return self.peak - self.start


def _resident(pid: str) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def memory(count: int, size: int) -> dict[str, Any]:
    """Peak memory of one large series, beside its size as an array; run it in a fresh process."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_series(folder / "in", count, size)
        worker.call(time.process_time)
        torch.zeros(1)
        times: dict[str, float] = {}
        series = count * size * size * 2
        catalog_memory = Memory()
        catalog = scan(folder / "in", 3, window=WINDOW)
        scanned = catalog_memory.stop()
        cohort = Cohort(catalog.cases, ("a",), catalog.refusals, catalog.root)
        watch = Memory()
        with timed(times, "protect"):
            write_copy(cohort, (size, size, count), folder / "out")
        peak = watch.stop()
    return times | {
        "slices": count,
        "series_mb": round(series / 1e6, 1),
        "scan_peak_mb": round(scanned / 1e6, 1),
        "protect_peak_mb": round(peak / 1e6, 1),
        "scan_ratio": round(scanned / series, 2),
        "protect_ratio": round(peak / series, 2),
    }


def scan_rate(count: int) -> dict[str, Any]:
    """Files per second of a scan of small slices in folders of 500; and of one that checks the pixels of a tenth."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_series(folder / "one", 1, 32)
        (first,) = (folder / "one").iterdir()
        content, own = first.read_bytes(), str(dcmread(first).SOPInstanceUID).encode()
        for index in range(count):
            path = folder / "in" / f"{index // 500}" / f"{index}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.replace(own, own[:-8] + b"%08d" % (index + 10**7)))
        found: dict[str, float] = {}
        with timed(found, "headers"):
            assert len(scan(folder / "in", 2, check_pixels=False).cases) == count
        part = folder / "in" / "0"
        with timed(found, "pixels"):
            checked = len(scan(part, 2, window=WINDOW).cases)
    return found | {
        "files": count,
        "headers_per_s": round(count / found["headers_wall_s"]),
        "headers_per_core_s": round(count / found["headers_cpu_s"]),
        "files_with_pixels": checked,
        "with_pixels_per_s": round(checked / found["pixels_wall_s"]),
        "with_pixels_per_core_s": round(checked / found["pixels_cpu_s"]),
    }


def shards(count: int, size: int) -> dict[str, Any]:
    """Seconds by the clock of the writing of eight series by one process and by two side by side."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(8):
            write_series(folder / "in" / str(index), count, size, name=str(index))
        found = {}
        for parts in (1, 2):
            commands = [
                [sys.executable, __file__, "--shard", f"{part + 1}/{parts}", "--work", name, "--size", str(size)]
                for part in range(parts)
            ]
            processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
            found[f"wall_s_{parts}"] = max(float(process.communicate()[0]) for process in processes)
            assert not any(process.returncode for process in processes)
            shutil.rmtree(folder / "out")
    return {"slices": 8 * count, "speedup": round(found["wall_s_1"] / found["wall_s_2"], 2)} | found


def one_shard(work: Path, shard: str, size: int) -> float:
    """Seconds that a shard takes for its part."""
    catalog = scan(work / "in", 3, check_pixels=False)
    cohort = Cohort(catalog.cases, ("a",), catalog.refusals, catalog.root)
    count = len(cohort.cases[0].files)
    begin = time.perf_counter()
    write_copy(cohort, (size, size, count), work / "out", shard)
    return time.perf_counter() - begin


PARTS: Mapping[str, Callable[[argparse.Namespace], Any]] = {
    "codecs": lambda options: codecs(options.slices, options.size, options.repetitions),
    "memory": lambda options: memory(options.series, options.size),
    "scan": lambda options: scan_rate(options.files),
    "shards": lambda options: shards(options.slices, options.size),
}


def main() -> None:
    """Measure what is asked for, and keep it beside what the result file has already."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--slices", type=int, default=60, help="of a series, for codecs and shards")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--series", type=int, default=1000, help="slices of the series whose memory is measured")
    parser.add_argument("--files", type=int, default=20000, help="files of the export that is scanned")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.shard:
        print(one_shard(options.work, options.shard, options.size))
        return
    kept = json.loads(options.output.read_text()) if options.output and options.output.is_file() else {}
    for part in options.only:
        kept[part] = PARTS[part](options)
        print(part, json.dumps(kept[part]), flush=True)
    codec_versions = {name: version(name) for name in ("pydicom", "pyjpegls", "pylibjpeg-openjpeg", "pylibjpeg-rle")}
    kept |= {"machine": machine(), "versions": versions() | codec_versions}
    if options.output:
        write_atomically(json.dumps(kept, indent=1) + "\n", options.output)


if __name__ == "__main__":
    main()
