"""The ways to sample, as a setting names them."""

from enum import Enum


class Solver(Enum):
    """Ways from noise to z_0: DDIM, of first order, or DPM-Solver++(2M), of second; one step is the same in both."""

    ddim = "ddim"
    dpm = "dpm"
