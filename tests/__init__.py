"""A package, so that no installed one of this name takes its place in the processes that tests start: torch-fidelity brings one."""
