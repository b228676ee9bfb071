"""The parts of scripts/bench: images, workloads, measuring, the table."""
