"""The objectives side by side in a small rendered world: do HeRA's findings show on a CPU, with whatever answer."""
