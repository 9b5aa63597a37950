"""Does a long run stay as it begins? Memory, open files, threads and the size of its folder (Linux).

    python benchmarks/long_run.py                  # 100,000 iterations, or ten minutes, of each run
    python benchmarks/long_run.py --seconds 60     # a minute of each

Runs of main.py are sampled from outside, twice a second, by /proc. Growth is counted from the end of a
warm-up, a fifth of the samples.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import RESULTS, Parser, UsageError, launch, main_line, read_json, write_images, write_json

WARM_UP, INTERVAL, TERMINATED = 0.2, 0.5, 143  # share of the samples, seconds, exit code
IMAGES = "--dataset images:FOLDER --image-size 14 --channels 1 --learner fc -n 3 -k 1 -q 2 -s 1"
WORKS = {
    "sinusoid, compiled": "--compile on",
    "sinusoid, uncompiled": "--compile off",
    "images, uncompiled": f"--compile off --meta-batch-size 2 {IMAGES}",
}


def take_sample(process: subprocess.Popen[bytes], folder: Path) -> dict[str, int] | None:
    """Return one sample; None before the run's folder exists and after the end."""
    proc = Path(f"/proc/{process.pid}")
    try:
        status = (proc / "status").read_text()
        names = ("VmRSS", "VmHWM", "Threads")
        resident, peak, threads = (int(status.split(f"{name}:")[1].split()[0]) for name in names)
        sample = {"memory": 1024 * resident, "peak": 1024 * peak, "threads": threads}
        sample["folder"] = sum(file.stat().st_size for file in folder.iterdir())
        return sample | {"files": len(list((proc / "fd").iterdir()))}
    except (OSError, IndexError):
        return None


def watch(flags: list[str], iterations: int, seconds: float, root: Path) -> dict[str, Any]:
    """Run so many iterations, or as many as time allows; return what is recorded."""
    place = ["--threads", "1", "--checkpoint-path", str(root), "--run-name", "run"]
    line = main_line([*flags, "--iterations", str(iterations), *place])
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    begin, samples = time.monotonic(), []
    while process.poll() is None:
        time.sleep(INTERVAL)
        sample = take_sample(process, root / "run")
        samples += [sample] if sample else []
        if time.monotonic() - begin > seconds:
            process.terminate()
            process.wait()
    if process.returncode not in (0, TERMINATED) or len(samples) < 10:
        raise UsageError(f"main.py {' '.join(flags)}: exit code {process.returncode}, {len(samples)} samples")
    warm = samples[int(WARM_UP * len(samples)) :]
    return {
        "iterations": read_json(root / "run" / "training.json")["iteration"],
        "peak_bytes": samples[-1]["peak"],
        "grown_bytes": warm[-1]["memory"] - warm[0]["memory"],
        "files": [min(s["files"] for s in warm), max(s["files"] for s in warm)],
        "threads": [min(s["threads"] for s in warm), max(s["threads"] for s in warm)],
        "folder_bytes": samples[-1]["folder"],
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--iterations", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=600, help="of a run, at most")
    parser.add_argument("--works", nargs="+", choices=WORKS, default=[*WORKS])
    parser.add_argument("--out", type=Path, default=RESULTS / "long_run.json", help="the JSON file")
    options = parser.parse_args()
    if not Path("/proc/self/status").exists():
        raise UsageError("runs are sampled by /proc, which this system lacks: use Linux")
    results = read_json(options.out) if options.out.exists() else {}
    for name in options.works:
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "images"
            if "FOLDER" in WORKS[name]:
                write_images(folder, 40, 20, 28)
            flags = WORKS[name].replace("FOLDER", str(folder)).split()
            results[name] = watch(flags, options.iterations, options.seconds, Path(root))
        print(f"{name}: {results[name]}", flush=True)
        write_json(options.out, results)


if __name__ == "__main__":
    launch(main)
