"""A load test on loopback: the service with and without batching, on each of some exports, in turns.

    python examples/serve/load.py dense-int8 shared-int8 [--clients 8] [--seconds 10] [--rounds 3] [--json FILE]

Each service runs as a process of its own; each client sends one text a request, waits for the answer and sends the
next. The clients share the processors with the service, so figures compare and are no limits of the machine.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx2

HERE = Path(__file__).parent
WORDS = [
    "a",
    "the",
    "cat",
    "dog",
    "man",
    "woman",
    "bird",
    "sits",
    "runs",
    "plays",
    "sings",
    "on",
    "in",
    "mat",
    "park",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="exports of encoders, with their tokenizers")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each service in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="compute threads of a service")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    services = {
        f"{folder.name}, {'batches' if most > 1 else 'one by one'}": start(folder, most, options.threads)
        for folder in options.folders
        for most in (1, options.batch)
    }
    try:
        found = {name: [] for name in services}
        for _ in range(options.rounds):
            for name, (_, port) in services.items():
                found[name].append(asyncio.run(loaded(port, options.clients, options.seconds)))
    finally:
        ends = {name: stop(process) for name, (process, _) in services.items()}
    print(table(found))
    if wrong := [name for name, status in ends.items() if status]:
        raise SystemExit(f"{wrong[0]} did not stop in good order.")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def start(folder: Path, most: int, threads: int) -> tuple[subprocess.Popen, int]:
    """A service and its port; returns when it is healthy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"MODEL": str(folder.absolute()), "MAX_BATCH": str(most), "THREADS": str(threads)}
    command = [sys.executable, "-m", "uvicorn", "--app-dir", HERE, "app:app", "--port", str(port),
               "--log-level", "warning", "--timeout-graceful-shutdown", "10"]  # fmt: skip
    process = subprocess.Popen(command, env=os.environ | settings)
    for _ in range(600):
        try:
            httpx2.get(f"http://127.0.0.1:{port}/health").raise_for_status()
            return process, port
        except httpx2.HTTPError:
            if process.poll() is not None:
                break
            time.sleep(0.1)
    process.kill()
    raise SystemExit(f"the service of {folder} did not start.")


def stop(process: subprocess.Popen) -> int:
    """Its exit status after SIGTERM; uvicorn ends with the signal once all is answered."""
    process.send_signal(signal.SIGTERM)
    status = process.wait(30)
    return 0 if status in (0, -signal.SIGTERM) else status


async def loaded(port: int, clients: int, seconds: float) -> dict[str, float]:
    """Requests a second, and the milliseconds of half and of 95 % of them."""
    taken: list[float] = []
    address = f"http://127.0.0.1:{port}/encode"
    end = time.perf_counter() + seconds

    async def client(seed: int) -> None:
        draw = random.Random(seed)
        async with httpx2.AsyncClient(timeout=60) as http:
            while time.perf_counter() < end:
                text = " ".join(draw.choices(WORDS, k=10))
                began = time.perf_counter()
                answer = await http.post(address, json={"texts": [text]})
                answer.raise_for_status()
                taken.append(1000 * (time.perf_counter() - began))

    began = time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    took = time.perf_counter() - began
    cuts = statistics.quantiles(taken, n=100, method="inclusive")
    return {"requests_per_second": len(taken) / took, "p50_ms": cuts[49], "p95_ms": cuts[94]}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Medians of the rounds, as Markdown."""
    lines = ["| service | requests/s | from, to | p50, ms | p95, ms |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, rounds in found.items():
        rate, half, most = (sorted(one[key] for one in rounds) for key in rounds[0])
        cells = [f"{statistics.median(rate):.0f}", f"{rate[0]:.0f} to {rate[-1]:.0f}"]
        cells += [f"{statistics.median(values):.1f}" for values in (half, most)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
