"""`python -m torch_bridge.benchmark`: time, memory and gradient error of jaxkd beside other ways to the same loss.

``tasks.py`` says what is computed and what is right of it, ``contenders.py`` who takes part, ``measuring.py`` how it is
measured, ``measurements.py`` and ``tables.py`` what is kept and shown; ``training_step.py`` measures a whole step of
training. May import jaxkd, `torch_bridge.reference`, `torch_bridge.convert`; nothing imports it.
"""
