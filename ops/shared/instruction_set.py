"""The instructions that the C kernels may use: what $OCTAVO_ISA names.

    native     those of this machine; nothing said means this
    avx2       AVX2, FMA, F16C and BMI2, and no AVX-512: what x86-64 machines since about 2013 have
    generic    those that every machine of the architecture has

It is for comparing machines on one of them. What is not `native` and cannot run here is refused, never replaced.
"""

import os
import platform
from pathlib import Path

ISA_FLAGS = {"native": ("-march=native",), "avx2": ("-mavx2", "-mfma", "-mf16c", "-mbmi2"), "generic": ()}
"""Flags of GCC and Clang by the name of the instruction set."""


def cpu_flags() -> set[str] | None:
    """Names of the features of this machine's first core, as Linux has them; None where nobody says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((set(line.split()) for line in lines if line.startswith("flags")), None)


def chosen_isa() -> str:
    """The name of the instruction set that the environment asks for.

    Raises:
        ValueError: it asks for one that there is not, or that this machine cannot run.
    """
    chosen = os.environ.get("OCTAVO_ISA") or "native"
    if chosen not in ISA_FLAGS:
        raise ValueError(f"OCTAVO_ISA={chosen} is none of {', '.join(ISA_FLAGS)}; leave it out for this machine's own")
    if chosen != "avx2":
        return chosen
    if platform.machine() not in ("x86_64", "AMD64"):
        raise ValueError(f"OCTAVO_ISA=avx2 is for x86-64, and this is {platform.machine()}; leave it out, or generic")
    there = cpu_flags()
    missing = sorted({flag[2:] for flag in ISA_FLAGS["avx2"]} - there) if there else []
    if missing:
        raise ValueError(f"OCTAVO_ISA=avx2, and this processor has no {', '.join(missing)}; leave it out, or generic")
    return chosen
