"""ChatRWKV's strategy strings, and what a CPU does for them.

    strategy = part { "->" part }
    part     = device " " type [ " *" layers [ "+" ] ]
    device   = ( "cpu" | "cuda" | "mps" | "dml" | … ) [ ":" number ]
    type     = ( "fp32" | "fp16" | "bf16" ) [ "i8" | "i4" | "i3" ]

such as "cuda fp16i8 *20+ -> cpu fp32": 20 layers on the GPU as bytes, streamed, the others on the
CPU. Here all layers are on the CPU, and a checkpoint is converted to one format: the smallest one
that is named, since such strings are written to save memory.
"""

from __future__ import annotations

import re
import warnings

# By type, the smallest first; bfloat16 has no format of its own.
FORMATS = {
    "i3": "Q4_0",
    "i4": "Q4_1",
    "i8": "Q8_0",
    "fp16": "FP16",
    "bf16": "FP16",
    "fp32": "FP32",
}
_PART = re.compile(r"([a-z]+)(?::\d+)? +(fp32|fp16|bf16)(i8|i4|i3)?(?: +\*\d+\+?)?", re.ASCII)


def format_of(strategy: str) -> str:
    """The format that a checkpoint is converted to. Raises ValueError if it is no strategy.

    Warns, once per call, of devices other than the CPU.
    """
    types, devices = [], []
    for part in strategy.split("->"):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"strategy {strategy!r}: expected 'cpu fp32' or the like, parts joined by '->',"
                f" found {part.strip()!r}"
            )
        device, floats, integers = match.groups()
        devices.append(device)
        types.append(integers or floats)
    if others := [device for device in dict.fromkeys(devices) if device != "cpu"]:
        warnings.warn(
            f"strategy {strategy!r}: all layers are on the CPU, none on {', '.join(others)}",
            stacklevel=3,
        )
    return FORMATS[min(types, key=list(FORMATS).index)]
