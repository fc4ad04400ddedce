"""jaxkd's losses under torch.autograd."""

import jax
import jax.numpy as jnp
import pytest
import torch

import jaxkd
from torch_bridge import reference, to_jax, torch_loss

N, D, DT, V = 12, 6, 5, 17
OPTIONS = {"temperature": 2.0, "soft_weight": 0.6, "hard_weight": 0.4}
JSD = torch_loss(jaxkd.fused_linear_jsd, beta=0.3, chunk_size=5, **OPTIONS)  # compiled once for most tests


def tensors(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    made = {
        "student_hidden": torch.randn(N, D, generator=generator),
        "student_weight": torch.randn(V, D, generator=generator),
        "teacher_hidden": torch.randn(N, DT, generator=generator),
        "teacher_weight": torch.randn(V, DT, generator=generator),
        "student_bias": torch.randn(V, generator=generator),
    }
    made = {name: x.to(device, dtype) for name, x in made.items()}
    for name in ("student_hidden", "student_weight", "student_bias"):
        made[name].requires_grad_()
    labels = torch.randint(V, (N,), generator=generator)
    labels[::4] = -100
    return made | {"labels": labels.to(device)}


def dense_loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, student_bias, **options):
    return reference.distillation_loss(
        reference.LinearLogits(student_hidden, student_weight, student_bias),
        reference.LinearLogits(teacher_hidden, teacher_weight),
        labels,
        divergence=reference.jensen_shannon(0.3),
        **options,
    )


def check_against_dense(device, dtype, tolerance):
    ours = tensors(dtype, device)
    loss, metrics = JSD(**ours)
    (2.5 * loss).backward()

    exact = {k: x.detach().double() if x.is_floating_point() else x for k, x in ours.items()}
    for name in ("student_hidden", "student_weight", "student_bias"):
        exact[name].requires_grad_()
    exact_loss, exact_metrics = dense_loss(**exact, **OPTIONS)
    (2.5 * exact_loss).backward()

    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=0)
    for name, value in exact_metrics.items():
        torch.testing.assert_close(metrics[name].double(), value.double(), rtol=1e-5, atol=0)
    for name in ("student_hidden", "student_weight", "student_bias"):
        got, truth = ours[name].grad, exact[name].grad
        assert got.dtype == dtype
        assert got.device == ours[name].device
        assert (got.double() - truth).norm() <= tolerance * truth.norm(), name
    assert ours["teacher_hidden"].grad is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 2e-3)])
def test_gradients_are_those_of_the_dense_loss_times_the_upstream_gradient(dtype, tolerance):
    check_against_dense("cpu", dtype, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 8e-3), (torch.float16, 2e-3)])
def test_gradients_on_cuda(dtype, tolerance):
    check_against_dense("cuda", dtype, tolerance)


@pytest.mark.gpu
def test_a_training_loop_on_cuda_repeats_itself():
    """Memory of one side that the other reuses too early would change the numbers from run to run."""

    def run():
        generator = torch.Generator("cuda").manual_seed(0)
        hidden, teacher_hidden = torch.randn(2, 1024, 256, device="cuda", generator=generator)
        head, teacher_head = torch.randn(2, 8000, 256, device="cuda", generator=generator) / 16
        head = head.clone().requires_grad_()
        loss_fn = torch_loss(jaxkd.fused_linear_jsd, chunk_size=512)
        losses = []
        for _ in range(30):
            loss, _ = loss_fn(hidden, head, teacher_hidden, teacher_head)
            loss.backward()
            jnp.zeros(8000 * 256).block_until_ready()  # fills whatever memory JAX believes to be free again
            with torch.no_grad():
                head -= 1000 * head.grad
            head.grad = None
            losses.append(loss.detach())
        return torch.stack(losses)

    first = run()
    assert first[-1] < 0.9 * first[0]
    for _ in range(3):
        torch.testing.assert_close(run(), first, rtol=1e-4, atol=0)


def test_finite_differences_in_float64(x64):
    made = tensors(torch.float64)
    student, teacher = ("student_hidden", "student_weight", "student_bias"), ("teacher_hidden", "teacher_weight")
    loss_fn = torch_loss(jaxkd.fused_linear_jsd, temperature=1.5, hard_weight=0.5)

    def loss(hidden, weight, bias):
        rest = {name: made[name] for name in (*teacher, "labels")}
        return loss_fn(student_hidden=hidden, student_weight=weight, student_bias=bias, **rest)[0]

    assert torch.autograd.gradcheck(loss, [made[name] for name in student])


def test_gradients_flow_on_into_the_model():
    made = tensors()
    model = torch.nn.Linear(D, D)
    inputs = made["student_hidden"].detach()
    made["student_hidden"] = model(inputs)
    JSD(**made)[0].backward()
    got = [p.grad for p in model.parameters()]
    made["student_hidden"] = model(inputs)
    expected = torch.autograd.grad(dense_loss(**made, **OPTIONS)[0], list(model.parameters()))
    torch.testing.assert_close(got, list(expected), rtol=1e-4, atol=1e-6)


class Traces:
    """A small loss that counts how often it is traced."""

    def __init__(self):
        self.count = 0

    def __call__(self, hidden, weight, labels, *, temperature=1.0):
        self.count += 1
        logits = hidden @ weight.astype(hidden.dtype).T / temperature
        return jnp.sum(jnp.tanh(logits.astype(jnp.float32)) * (labels >= 0)[:, None]), {}


def test_compiled_once_for_each_shape_dtype_and_selection():
    traces = Traces()
    loss_fn = torch_loss(traces)
    made = tensors()
    hidden, weight, labels = made["student_hidden"], made["student_weight"], made["labels"]
    for step in range(3):
        loss, _ = loss_fn(hidden + step, weight, labels)
        loss.backward()
    assert traces.count == 1
    torch_loss(traces)(hidden, weight, labels)
    assert traces.count == 1
    with torch.no_grad():
        loss_fn(hidden, weight, labels)
        loss_fn(hidden, weight, labels)
    assert traces.count == 2
    loss_fn(hidden, weight.detach(), labels)
    assert traces.count == 3
    loss_fn(hidden[:5], weight, labels[:5])
    assert traces.count == 4
    loss_fn(hidden.bfloat16(), weight, labels)
    assert traces.count == 5


def test_a_number_is_a_constant_and_a_tensor_is_traced():
    traces = Traces()
    loss_fn = torch_loss(traces)
    made = tensors()
    arguments = made["student_hidden"], made["student_weight"], made["labels"]
    with torch.no_grad():
        constant = [loss_fn(*arguments, temperature=tau)[0] for tau in (1.0, 2.0)]
        assert traces.count == 2
        traced = [loss_fn(*arguments, temperature=torch.tensor(tau))[0] for tau in (1.0, 2.0)]
        assert traces.count == 3
    assert constant[0] != constant[1]
    torch.testing.assert_close(traced, constant)


def test_a_tensor_that_requires_no_grad_is_not_differentiated():
    @jax.custom_jvp
    def guarded(x):
        return x

    @guarded.defjvp
    def _refuse(primals, tangents):
        raise AssertionError("differentiated")

    loss_fn = torch_loss(lambda hidden, weight: (jnp.sum(jnp.tanh(hidden @ guarded(weight).T)), {}))
    made = tensors()
    loss, metrics = loss_fn(made["student_hidden"], made["student_weight"].detach())
    loss.backward()
    assert made["student_hidden"].grad.any()
    assert metrics == {}
    with torch.no_grad():
        loss_fn(made["student_hidden"], made["student_weight"])
    with pytest.raises(AssertionError, match="differentiated"):
        loss_fn(made["student_hidden"], made["student_weight"])


def test_without_grad_mode_there_is_only_the_loss():
    made = tensors()
    with torch.no_grad():
        loss, metrics = JSD(**made)
    assert not loss.requires_grad
    trained, trained_metrics = JSD(**made)
    assert trained.requires_grad
    assert not any(x.requires_grad for x in trained_metrics.values())
    torch.testing.assert_close(trained.detach(), loss)
    torch.testing.assert_close(trained_metrics, metrics)


def test_sources_and_divergences_as_arguments():
    made = tensors()
    loss, _ = torch_loss(jaxkd.distillation_loss, divergence=jaxkd.jensen_shannon(0.3))(
        jaxkd.LinearLogits(made["student_hidden"], made["student_weight"], made["student_bias"]),
        jaxkd.LinearLogits(to_jax(made["teacher_hidden"]), to_jax(made["teacher_weight"])),
        made["labels"],
    )
    loss.backward()
    torch.testing.assert_close(loss, dense_loss(**made)[0])
    assert made["student_bias"].grad.any()


def test_sequences_and_slices():
    made = tensors()
    expected, _ = JSD(**made)
    wide = torch.cat([made["student_hidden"], torch.ones(N, 1)], dim=1)
    made["student_hidden"] = wide.reshape(3, 4, D + 1)[..., :D]
    made["teacher_hidden"] = made["teacher_hidden"].reshape(3, 4, DT)
    made["labels"] = made["labels"].reshape(3, 4)
    assert not made["student_hidden"].is_contiguous()
    loss, _ = JSD(**made)
    torch.testing.assert_close(loss, expected)


def test_a_label_beyond_32_bits_is_outside_the_vocabulary_and_does_not_wrap_around():
    made = tensors()
    made["labels"][1] = 2**32 + 1
    assert JSD(**made)[0].isnan()


def test_tensors_may_change_after_the_call():
    untouched, changed = tensors(), tensors()
    JSD(**untouched)[0].backward()
    loss, _ = JSD(**changed)
    with torch.no_grad():
        for name in ("student_hidden", "student_weight", "teacher_weight"):
            changed[name].zero_()
    loss.backward()
    torch.testing.assert_close(changed["student_weight"].grad, untouched["student_weight"].grad)


def test_backward_twice_and_no_second_derivative():
    made = tensors()
    hidden = made["student_hidden"]
    loss, _ = JSD(**made)
    first, second = (torch.autograd.grad(3 * loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match=r"no second derivative.*create_graph"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_errors_of_the_loss_and_the_bridge_come_through():
    made = tensors()
    with pytest.raises(TypeError, match=r"jax\.lax\.stop_gradient"):
        torch_loss(jaxkd.fused_linear_jsd)(**made, temperature=torch.tensor(2.0, requires_grad=True))
    with pytest.raises(TypeError, match="`function` is 'jsd'; give a loss itself"):
        torch_loss("jsd")
    with pytest.raises(ValueError, match="beta"):
        torch_loss(jaxkd.fused_linear_jsd, beta=1.5)(**made)
    with pytest.raises(TypeError, match="narrowed to float32"):
        torch_loss(jaxkd.fused_linear_jsd)(**made, weights=torch.ones(N, dtype=torch.float64))
