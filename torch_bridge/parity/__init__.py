"""`python -m torch_bridge.parity`: every loss of jaxkd against its dense float64 twin in PyTorch, on the same buffers.

Each ``compare_*.py`` lists the comparisons of one subject. May import jaxkd, `torch_bridge.reference`,
`torch_bridge.teachers` and the bridge itself; nothing imports it.
"""
