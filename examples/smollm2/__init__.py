"""The parts of ``examples.distill_smollm2`` and ``examples.on_policy``: teacher, text, student, sampler, training."""
