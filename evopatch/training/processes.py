"""Which of the processes of a run this one is."""

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def on_cpu() -> bool:
    """Whether a run is on the CPU: asked for with `accelerate launch --cpu`, or for want of anything else.

    accelerate has to be told so: `torchrun` on a machine without an accelerator otherwise gives processes that know
    nothing of each other, and each would train by itself, into the same folder.
    """
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return bool(PartialState(cpu=on_cpu()).is_main_process)


def end() -> None:
    """Leave the process group, at the end of a program."""
    PartialState(cpu=on_cpu()).destroy_process_group()
