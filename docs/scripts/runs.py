"""The benchmark's runs in bench/results: the machines of the CPU's, the calls of the GPU's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Machine:
    """What the JSON of a run does not say about it."""

    file: str
    name: str
    processor: str
    state: str  # of the source when it was measured
    whole: bool = True  # False: some groups only, so neither in the summary nor in the picture


MACHINES = (
    Machine(
        "cpu-zen5", "Zen 5",
        "AMD EPYC (Zen 5), AVX-512 with BF16, 48 KB of L1 and 1 MB of L2 per core, 32 MB of L3",
        "commit 54b9042",
    ),
    Machine(
        "cpu-graniterapids", "Granite Rapids",
        "Intel Xeon, presumably Granite Rapids, AVX-512 with AMX, 2 MB of L2 per core, "
        "480 MB of L3",
        "30 November 2026, commit 4b89e1d",
    ),
    Machine(
        "cpu-emeraldrapids", "Emerald Rapids",
        "Intel Xeon (Emerald Rapids), AVX-512 with AMX, 2 MB of L2 per core",
        "27 November 2026, before commit 1977a83 (single steps of more than eight rows)",
    ),
    Machine(
        "cpu-icelake", "Ice Lake",
        "Intel Xeon (Ice Lake), AVX-512 without BF16, 1.25 MB of L2 per core",
        "23 November 2026, before commit 34d352d",
    ),
    Machine(
        "cpu-graniterapids-peers", "Granite Rapids, other libraries", "The same Granite Rapids",
        "29 November 2026, commit 52d1d16: before small calls became up to 2 times as fast",
        whole=False,
    ),
    Machine(
        "cpu-icelake-peers", "Ice Lake, other libraries", "The same Ice Lake",
        "23 November 2026, before single steps became 1.2 to 1.4 times as fast",
        whole=False,
    ),
)  # fmt: skip
WHOLE = tuple(machine for machine in MACHINES if machine.whole)


def load(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class GpuCall:
    """One result of the GPU benchmark; `call` reads "LSTM T512 B16 I512 H512 bf16 infer"."""

    call: str
    ours: float  # µs
    graph: float
    theirs: float
    steps: int

    def __post_init__(self) -> None:
        if self.precision not in ("fp16", "bf16", "fp32", "tf32"):
            raise ValueError(f"unexpected call {self.call!r}")

    @property
    def cell(self) -> str:
        return self.call.split()[0]

    @property
    def precision(self) -> str:
        return self.call.split()[-2]

    @property
    def units(self) -> int:
        return next(int(word[1:]) for word in self.call.split() if word[0] == "H")

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours

    @property
    def kind(self) -> str:
        words = self.call.split()
        if any(word in ("bi", "L2", "packed") for word in words):
            return "bidirectional, two layers, or ragged; H 256"
        if self.units >= 1024 or any(word.startswith("proj") for word in words):
            return "stepwise: H 1024 and 2048, projection"
        if self.precision == "bf16":
            return "bfloat16, H 64–768, B 1–128"
        if self.precision == "fp16":
            return "float16 LSTM, H 128–768" if self.cell == "LSTM" else "float16 GRU and RNN"
        return "float32 and TF32, H 64" if self.units == 64 else "float32 and TF32, H 256 and 512"


GPU_KINDS = (
    "bidirectional, two layers, or ragged; H 256",
    "bfloat16, H 64–768, B 1–128",
    "float16 GRU and RNN",
    "float32 and TF32, H 256 and 512",
    "float16 LSTM, H 128–768",
    "stepwise: H 1024 and 2048, projection",
    "float32 and TF32, H 64",
)


def gpu_calls() -> list[GpuCall]:
    return [
        GpuCall(r["call"], r["ours"], r["graph"], r["theirs"], r["steps"])
        for r in load("gpu-h200")["results"]
        if not r["wrong"]
    ]
