"""The parts of ``examples.distill_smollm2``: teacher, text, student, training and report, one a module."""
