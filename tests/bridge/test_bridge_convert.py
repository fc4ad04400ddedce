"""Arrays across DLPack: values, memory, and what cannot cross."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torch_bridge import borrow_as_jax, borrow_as_torch, to_jax, to_torch

DTYPES = ["float32", "bfloat16", "float16", "bool", "int8", "int16", "int32", "uint8"]


def a_tensor(dtype):
    return torch.arange(-3, 9).reshape(3, 4).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("there", "back"), [(to_jax, to_torch), (borrow_as_jax, borrow_as_torch)])
def test_values_and_dtype_survive_the_round_trip(dtype, there, back):
    tensor = a_tensor(dtype)
    array = there(tensor)
    assert array.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(array.astype(jnp.float32)), tensor.float().numpy())
    assert torch.equal(back(array), tensor)


@pytest.mark.parametrize("shape", [(), (0, 4), (1,)])
def test_small_shapes(shape):
    assert to_torch(to_jax(torch.ones(shape))).shape == shape


@pytest.mark.parametrize("dtype", DTYPES)
def test_borrowing_shares_memory_and_converting_does_not(dtype):
    tensor, array = a_tensor(dtype), jnp.zeros((4, 64), dtype)
    assert borrow_as_jax(tensor).unsafe_buffer_pointer() == tensor.data_ptr()
    assert borrow_as_torch(array).data_ptr() == array.unsafe_buffer_pointer()
    assert to_jax(tensor).unsafe_buffer_pointer() != tensor.data_ptr()
    assert to_torch(array).data_ptr() != array.unsafe_buffer_pointer()


def crosses_from_the_middle(device):
    """A slice starts at any byte; what JAX makes of it is to be computed with."""
    whole = torch.arange(64.0, device=device)
    for start in range(1, 6):
        for convert in (to_jax, borrow_as_jax):
            assert float(jax.jit(jnp.sum)(convert(whole[start:]))) == float(whole[start:].sum())


def test_a_slice():
    crosses_from_the_middle("cpu")


@pytest.mark.gpu
def test_a_slice_on_cuda():
    crosses_from_the_middle("cuda")


def test_torch_cannot_write_into_a_converted_array():
    tensor = torch.zeros(64)
    array = to_jax(tensor)
    tensor.add_(1)
    to_torch(array).add_(1)
    np.testing.assert_array_equal(array, 0)


def test_a_borrowed_tensor_outlives_the_array():
    array = jnp.arange(64.0) + 1
    tensor = borrow_as_torch(array)
    del array
    assert tensor.sum() == 64 * 65 / 2


def test_64_bits_cross_under_x64_only(x64):
    for dtype in (torch.float64, torch.int64):
        tensor = torch.arange(5, dtype=dtype)
        assert torch.equal(to_torch(to_jax(tensor)), tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex128])
def test_64_bits_are_not_narrowed_silently(dtype):
    with pytest.raises(TypeError, match=r"`tensor`.*narrowed.*tensor\.to\(.*jax_enable_x64"):
        to_jax(torch.zeros(3, dtype=dtype))


@pytest.mark.parametrize("convert", [to_jax, borrow_as_jax])
@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (torch.zeros(2, 3, requires_grad=True), TypeError, r"shape \(2, 3\).*requires grad.*tensor\.detach\(\)"),
        (torch.zeros(4, 6)[:, :3], ValueError, r"strides \(6, 1\).*tensor\.contiguous\(\)"),
        (torch.zeros(1, 6).expand(4, 6), ValueError, r"strides \(0, 1\).*tensor\.contiguous\(\)"),
        (torch.zeros(4, 6).T, ValueError, r"tensor\.contiguous\(\)"),
        (torch.zeros(3, 3).to_sparse(), TypeError, r"sparse.*tensor\.to_dense\(\)"),
        (torch.zeros(3, device="meta"), ValueError, r"on meta.*tensor\.cpu\(\)"),
        (np.zeros(3), TypeError, r"`tensor` must be a torch\.Tensor, got ndarray"),
    ],
)
def test_tensors_that_cannot_cross(convert, tensor, error, message):
    with pytest.raises(error, match=message):
        convert(tensor)


@pytest.mark.parametrize("convert", [to_torch, borrow_as_torch])
def test_arrays_that_cannot_cross(convert):
    with pytest.raises(TypeError, match=r"`array` must be a JAX array, got ndarray: wrap it in jnp\.asarray"):
        convert(np.zeros(3))
    with pytest.raises(TypeError, match=r"dtype int4, which DLPack cannot carry"):
        convert(jnp.zeros(3, jnp.int4))
    with pytest.raises(TypeError, match=r"`array` is traced \(float32\[3\]\).*outside jax\.jit"):
        jax.jit(lambda x: convert(x))(jnp.zeros(3))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_round_trip(dtype):
    tensor = a_tensor(dtype).cuda()
    array = borrow_as_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    assert torch.equal(to_torch(array), tensor)
    assert torch.equal(to_torch(to_jax(tensor)), tensor)
    assert to_torch(array).is_cuda
