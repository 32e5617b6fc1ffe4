"""Trainings of ms-swift, one after another: `swift_on_cpu.py JOBS`, a JSON object of lists of arguments of `swift sft`.

ms-swift lays rows end to end with flash attention only, which needs a GPU; here it does with torch's attention, which
keeps rows apart by their position ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from swift import sft_main
from swift.arguments.sft_args import SftArguments


def any_attention(arguments: SftArguments) -> None:
    arguments.padding_free = arguments.padding_free or arguments.packing


SftArguments._check_padding_free = any_attention

for name, job in json.loads(Path(sys.argv[1]).read_text()).items():
    try:
        sft_main(job)
    except ValueError as error:
        print(f"{name}: {error}")
