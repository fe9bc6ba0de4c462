"""Runs a finished program: on real ranks, or all ranks simulated in this process."""
