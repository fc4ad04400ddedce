"""`python -m torch_bridge.benchmark`: time, memory and gradient error of jaxkd beside other ways to the same loss.

``contenders.py`` has the losses that run, ``measurements.py`` what is kept and shown of them. May import jaxkd,
`torch_bridge.reference`, `torch_bridge.convert`; nothing imports it.
"""
