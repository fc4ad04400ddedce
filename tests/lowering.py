"""Kernels without their device: lowered to CUDA on any machine, and the Triton IR that JAX hands to its compiler."""

import jax

H100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
TPU = jax.sharding.AbstractDevice("TPU v5", 1, "tpu")
MI300X = jax.sharding.AbstractDevice("AMD Instinct MI300X", 304, "rocm")


def lower_for(device, function, *shapes):
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=(device.platform,))


def lower_for_h100(function, *shapes):
    return lower_for(H100, function, *shapes)


def triton_calls(lowered):
    """The attributes of every Triton custom call: its IR as MLIR bytecode, the warps and stages to compile it with."""
    calls = []

    def visit(operation):
        if operation.name == "stablehlo.custom_call" and "triton" in str(operation.attributes["call_target_name"]):
            calls.append(operation.attributes["mhlo.backend_config"])
        return WALK_ON

    from jaxlib.mlir import ir

    WALK_ON = ir.WalkResult.ADVANCE
    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return calls


def triton_ir(call) -> str:
    """The IR as the text that the `triton` package reads."""
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect

    with ir.Context() as context:
        dialect.register_dialect(context)
        context.load_all_available_dialects()
        return ir.Module.parse(call["ir"].value_bytes).operation.get_asm()
