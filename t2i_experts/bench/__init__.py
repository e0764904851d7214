"""Measurements: this project's own code beside strong baselines, in one process, with the error and the physical floor beside the time."""
